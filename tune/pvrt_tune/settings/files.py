"""Recipes in files: every setting by name, in YAML or JSON, over a preset."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from pvrt.errors import RunError
from pvrt_tune.progress import Report
from pvrt_tune.settings.recipe import Recipe, TrainSettings


def from_file(path: Path, base: Recipe, report: Report = print) -> Recipe:
    """The base recipe with the settings of a file, for example

        scheme: 2x8g8
        training: {steps: 800}
        pv: {strategy: subspace-straight-through}

    `report` gets a line about a file in the spelling of version 0.1. Raises RunError for a file
    that is no mapping and for settings that `Recipe` refuses.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror}); give another --config") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a month 13, and deep lists
        raise RunError(
            f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no settings; write lines like `scheme: 2x8g8`")
    if is_old(content):
        content = renewed(content)
        report(
            f"{path} is spelt as for version 0.1: `pv` is called `training` now, and `pv` inside "
            "it is `pv` beside it"
        )
    try:
        return Recipe(**_merged(asdict(base), content))
    except RunError as error:
        raise RunError(f"{path}: {error}") from error


def as_yaml(recipe: Recipe) -> str:
    """Every setting of a recipe, as `from_file` reads it."""
    plain: str = yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False)
    return plain


def is_old(content: Mapping[Any, Any]) -> bool:
    """Whether settings are spelt as in version 0.1: `pv` is the loop, or none, with the step's
    settings as `pv` inside.
    """
    if "pv" not in content or "training" in content:
        return False
    loop = content["pv"]
    if isinstance(loop, dict):
        return not loop or bool(loop.keys() & {"pv", *(f.name for f in fields(TrainSettings))})
    return loop is None


def renewed(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Settings in the old spelling in the new one, which has `pv` only beside a loop.

    trust_ratio is gone; None, its default, said that there was none.
    """
    rest = {name: value for name, value in content.items() if name != "pv"}
    if content["pv"] is None:
        return {**rest, "training": None}
    loop = dict(content["pv"])
    step = {"pv": loop.pop("pv")} if "pv" in loop else {}
    if isinstance(step.get("pv"), dict) and step["pv"].get("trust_ratio", 0) is None:
        step["pv"] = {name: value for name, value in step["pv"].items() if name != "trust_ratio"}
    return {**rest, "training": loop, **step}


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
        if isinstance(value, dict):
            value = _merged(present if isinstance(present, dict) else {}, value)
        merged[name] = value
    return merged
