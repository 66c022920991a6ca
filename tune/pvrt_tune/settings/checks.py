"""What makes a settings object: every value has a type and a range, and a mistake is one sentence.

Settings come from a file, from options and from code; all of them pass through the constructor of
a class that `settings` decorates, and nothing else checks them.
"""

from collections.abc import Callable
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_type_hints

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from pvrt.errors import RunError

T = TypeVar("T")

# Strict: "3" and True are no numbers. A whole number is a float all the same.
#: How many of something that there must be.
Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]
#: How often something is done that may be left out.
Repeats = Annotated[int, Field(strict=True, ge=0, le=10**9)]
#: A share of something, which is not nothing.
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
#: A share of something that leaves some of it over.
Part = Annotated[float, Field(strict=True, gt=0, lt=1)]
#: How much of a running mean is kept in a step.
Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]
#: Of a tensor's own size per step; 0 leaves it as it is.
Rate = Annotated[float, Field(strict=True, ge=0, le=1)]
#: A share of the steps, which may be none.
Ramp = Annotated[float, Field(strict=True, ge=0, le=1)]
#: A bound or weight.
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]

_LONGEST = 500  # characters of a value in a sentence
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Make a frozen dataclass whose constructor checks every field (dataclasses.replace does too).

    The constructor raises RunError with one sentence that names the setting, its value and what it
    can be; settings within settings may be given as mappings.
    """
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    check: Callable[..., None] = made.__init__

    @wraps(check)
    def init(self: Any, *values: Any, **named: Any) -> None:
        try:
            check(self, *values, **named)
        except ValidationError as error:
            raise RunError(_sentence(made, error)) from None

    made.__init__ = init
    checked: type[T] = made
    return checked


def _sentence(cls: Any, error: ValidationError) -> str:
    """The first of the mistakes."""
    mistake = error.errors(include_url=False)[0]
    kind, value = mistake["type"], _shown(mistake["input"])
    path: list[Any] = list(mistake["loc"])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        owner, known = ".".join(map(str, path[:-1])), list(_hints(cls, path[:-1]))
        near = get_close_matches(str(path[-1]), known, 1)
        advice = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
        has = f"{owner} has" if owner else "there is"
        return f"{has} no setting {str(path[-1])[:_LONGEST]}; {advice}"
    if kind in ("missing", "too_long", "too_short", "tuple_type"):
        path = [part for part in path if isinstance(part, str)]
        count = len(get_args(_hints(cls, path[:-1])[str(path[-1])]))
        return f"{'.'.join(path)} takes {count} numbers, not {value}"
    name = ".".join(map(str, path))
    if kind == "dataclass_type":
        return f"{name} takes settings of its own, not {value}"
    if kind.endswith("_type"):
        wanted = kind.removesuffix("_type").replace("string", "str")
        return f"{name} takes a value of type {wanted}, not {value}"
    if kind == "value_error":
        return f"{name}: {str(mistake['ctx']['error'])[:_LONGEST]}"
    if kind == "string_unicode":
        return f"{name} is {value}, which is no text"
    if kind == "literal_error":
        return f"{name} is {value}; it can be {mistake['ctx']['expected']}"
    finite = " and finite" if kind == "finite_number" else ""
    return f"{name} is {value}; it must be {_range(cls, path)}{finite}"


def _shown(value: Any) -> str:
    """A value for people, who need not see all of it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number without end"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _hints(cls: Any, path: list[Any]) -> dict[str, Any]:
    """Types of the settings by name, with ranges, of the settings object at a path."""
    for part in path:
        hint = get_type_hints(cls)[part]
        cls = next(kind for kind in (hint, *get_args(hint)) if is_dataclass(kind))
    return get_type_hints(cls, include_extras=True)


def _range(cls: Any, path: list[Any]) -> str:
    """The numbers that the setting at a path can be, in words."""
    names = [part for part in path if isinstance(part, str)]
    hint = _hints(cls, names[:-1])[names[-1]]
    if names != path:  # one number of several
        hint = get_args(hint)[path[-1]]
    found = [extra for extra in (hint, *get_args(hint)) if hasattr(extra, "__metadata__")]
    bounds = [
        f"{word} {getattr(bound, name):g}"
        for name, word in _BOUNDS.items()
        for field in found[0].__metadata__
        for bound in field.metadata
        if hasattr(bound, name)
    ]
    return " and ".join(bounds)
