"""Where the bytes of a model are: bits per weight of every tensor; and the curves of its run."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pvrt.format.folder import MANIFEST_FILE, StoredModel


@dataclass(frozen=True)
class TensorSize:
    """A tensor, or all parts of a quantised layer: how many weights it stands for, in what bits.

    bits_per_weight counts codebooks, scales and zeros.
    """

    name: str
    weights: int
    bits_per_weight: float
    quantised: bool


@dataclass(frozen=True)
class Sizes:
    """Bytes of all weight files, weights of the model, and its tensors by name, numbers in names by
    their value. tensors is empty where the files are not read here (a GGUF).
    """

    file_bytes: int
    weights: int
    tensors: list[TensorSize]

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file over all weights."""
        return 8 * self.file_bytes / self.weights

    @classmethod
    def of(cls, stored: StoredModel) -> "Sizes":
        """Of an opened folder; reads headers only."""
        tensors = [
            TensorSize(
                layer.name,
                layer.out_features * layer.in_features,
                stored.layer_bits(layer) / (layer.out_features * layer.in_features),
                True,
            )
            for layer in stored.layers.values()
        ]
        for name in stored.dense_bytes():
            info = stored.tensors[name]
            tensors.append(TensorSize(name, info.elements, info.float_bits, False))
        weights = round(8 * stored.file_bytes() / stored.file_bits_per_weight())
        return cls(stored.file_bytes(), weights, sorted(tensors, key=_natural))


def _natural(tensor: TensorSize) -> list[int | str]:
    parts = re.split(r"(\d+)", tensor.name)
    return [int(part) if part.isdecimal() else part for part in parts]


@dataclass(frozen=True)
class Curves:
    """What pvrt.json says of the run: KL on held-out windows and in training by step of PV-Tuning,
    and every block's relative output error before and after its fine-tuning.
    """

    held_out: list[tuple[float, float]]
    training: list[tuple[float, float]]
    blocks: list[tuple[float, float]]

    @classmethod
    def of(cls, stored: StoredModel) -> "Curves | None":
        """From the manifest of a folder; None where it has none, or nothing to show.

        A manifest is anyone's data: what is not as expected is left out.
        """
        try:
            manifest = json.loads((stored.path / MANIFEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        steps = _rows(_get(_get(manifest, "pv"), "curves"))
        errors = [_get(block, "output_error") for block in _rows(_get(manifest, "blocks"))]
        found = cls(
            _pairs(steps, "step", "held_out_kl"),
            _pairs(steps, "step", "train_kl"),
            _pairs(_rows(errors), "before_finetune", "after"),
        )
        return found if found.held_out or found.blocks else None


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _pairs(rows: list[Mapping[str, Any]], *keys: str) -> list[tuple[float, float]]:
    """Two finite numbers of every row that has both."""
    found = []
    for row in rows:
        first, second = (_number(row.get(key)) for key in keys)
        if first is not None and second is not None:
            found.append((first, second))
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        return None
    return float(value)
