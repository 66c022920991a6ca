"""Recipes in files: every setting by name, in YAML or JSON, over a preset."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pvrt.errors import RunError
from pvrt.tools.perplexity import read_utf8
from pvrt_tune.settings import Recipe


def from_file(path: Path, base: Recipe) -> Recipe:
    """The base recipe with the settings of a file, for example

        scheme: 2x8g8
        pv: {steps: 800, pv: {strategy: subspace-straight-through}}

    Raises RunError for a file that is no mapping and for settings that `Recipe` refuses.
    """
    try:
        content = yaml.safe_load(read_utf8(path))
    except yaml.YAMLError as error:
        raise RunError(
            f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no settings; write lines like `scheme: 2x8g8`")
    try:
        return Recipe(**_merged(asdict(base), content))
    except RunError as error:
        raise RunError(f"{path}: {error}") from error


def as_yaml(recipe: Recipe) -> str:
    """Every setting of a recipe, as `from_file` reads it."""
    plain: str = yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _merged(base: Mapping[str, Any], changes: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested mappings, those in `changes` over those in `base`."""
    merged = dict(base)
    for key, value in changes.items():
        name = str(key)  # YAML has keys that are numbers, which name no setting
        present = base.get(name)
        if isinstance(present, dict) and isinstance(value, dict):
            value = _merged(present, value)
        merged[name] = value
    return merged
