"""What callers hand to the API's functions: choices, and checks of what has a range."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pvrt.errors import RunError

if TYPE_CHECKING:
    from pvrt.format.folder import StoredModel

#: A floating type to compute in; "auto" is float32 on a CPU, and a model's own elsewhere.
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
#: Presets of a recipe.
Effort = Literal["quick", "standard", "best"]
#: Where hidden states are kept; "auto" is memory if they fit.
Activations = Literal["auto", "memory", "disk"]


def name_of(model: "str | Path | StoredModel") -> str:
    """A model as a command names it."""
    return str(model if isinstance(model, str | Path) else model.path)


def one_of(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise RunError for a value that is no choice."""
    known = list(choices)
    if value not in known:
        raise RunError(f"--{option} is {value!r}; it must be one of {', '.join(known)}")


def at_least(least: int, **options: int | None) -> None:
    """Raise RunError for an option that is given and smaller."""
    for name, value in options.items():
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise RunError(f"--{option} is {value}; it must be at least {least}")


def at_most_one(**given: bool) -> None:
    """Raise RunError where several flags are given that exclude each other."""
    if sum(given.values()) > 1:
        flags = " and ".join(f"--{name}" for name, is_given in given.items() if is_given)
        raise RunError(f"{flags} exclude each other; give one of them")


def as_command(*words: object, **options: object) -> str:
    """The command of a call. Options are left out that are None or False; True has no value."""
    given = [str(word) for word in words]
    for name, value in options.items():
        if value is not None and value is not False:
            given += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(["pvrt", *given])
