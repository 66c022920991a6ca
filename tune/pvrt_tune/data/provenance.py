"""Where a model comes from, as far as it says so itself: its licence, and its name on the hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import cached_file

from pvrt.errors import PvrtError
from pvrt_tune.data.locate import locate

_CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Provenance:
    """What a source states: licence is a mapping of `license`, and of `license_name` and
    `license_link` where it is none of the hub's own; hub_id is org/name. Empty or None: not stated.
    """

    licence: dict[str, str]
    hub_id: str | None

    @classmethod
    def of(cls, model: str) -> "Provenance":
        """Of anything that `load_source` takes. A hub id's card is read where it can be had; what
        is not there or cannot be read states nothing.
        """
        try:
            place = locate(model, weights=False)
        except PvrtError:
            return cls({}, None)
        if place.is_file():
            return _of_gguf(place)
        on_hub = not Path(model).expanduser().exists()
        if on_hub:
            cached_file(
                model,
                _CARD,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        return cls(_licence(_front_matter(place / _CARD)), model if on_hub else None)


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML at the beginning of a model card."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _licence(fields: Mapping[str, Any]) -> dict[str, str]:
    names = ("license", "license_name", "license_link")
    return {name: fields[name] for name in names if isinstance(fields.get(name), str)}


def _of_gguf(file: Path) -> Provenance:
    """A GGUF's metadata: general.license, and the address of the model or of what it is made of."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def stated(key: str) -> str | None:
        value = fields[f"general.{key}"].contents() if f"general.{key}" in fields else None
        return value if isinstance(value, str) else None

    licence = {
        name: value
        for name, key in (
            ("license", "license"),
            ("license_name", "license.name"),
            ("license_link", "license.link"),
        )
        if (value := stated(key)) is not None
    }
    for key in ("source.repo_url", "source.huggingface.repository", "base_model.0.repo_url"):
        address = (stated(key) or "").removeprefix(_HUB)
        if _HUB_ID.fullmatch(address):
            return Provenance(licence, address)
    return Provenance(licence, None)
