"""Recipes in files: every setting by name, in YAML or JSON, over a preset."""

import dataclasses
import types
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pvrt.errors import RunError
from pvrt.evaluate import read_utf8
from pvrt_tune.recipe import Recipe

T = TypeVar("T")


def from_file(path: Path, base: Recipe) -> Recipe:
    """The base recipe with the settings of a file, for example

        scheme: 2x8g8
        pv: {steps: 800, pv: {strategy: subspace-straight-through}}

    Raises RunError for a file that is no mapping, an unknown setting or a value of a wrong type.
    """
    try:
        content = yaml.safe_load(read_utf8(path))
    except yaml.YAMLError as error:
        raise RunError(
            f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no settings; write lines like `scheme: 2x8g8`")
    return _replaced(base, content, str(path))


def as_yaml(recipe: Recipe) -> str:
    """Every setting of a recipe, as `from_file` reads it."""
    plain: str = yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _replaced(base: T, content: dict[str, Any], where: str) -> T:
    """A settings object with some of its fields replaced."""
    hints = get_type_hints(type(base))
    changes = {}
    for key, value in content.items():
        if key not in hints:
            near = get_close_matches(str(key), hints, 1)
            advice = f"did you mean {near[0]}?" if near else f"it knows {', '.join(hints)}"
            raise RunError(f"{where} has no setting {key}; {advice}")
        changes[key] = _converted(getattr(base, key), value, hints[key], f"{where}: {key}")
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _converted(present: Any, value: Any, kind: Any, where: str) -> Any:
    """A value from a file as a field's type."""
    if get_origin(kind) in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        kind = next(option for option in get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise RunError(f"{where} takes settings of its own, not {value!r}")
        return _replaced(kind() if present is None else present, value, where)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise RunError(f"{where} is {value!r}; it can be {', '.join(map(str, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if not isinstance(value, list) or len(value) != len(items):
            raise RunError(f"{where} takes {len(items)} numbers, not {value!r}")
        return tuple(_converted(None, v, k, where) for v, k in zip(value, items, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RunError(f"{where} takes a value of type {kind.__name__}, not {value!r}")
    return value
