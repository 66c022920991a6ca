"""A model folder, whatever the layout of its layers: headers and what they add up to."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from pvrt.errors import CheckpointError
from pvrt.format.scheme import GridScheme, Scheme

MANIFEST_FILE = "pvrt.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its header says. `dtype` is the safetensors name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def float_bits(self) -> int:
        """Bits of one element."""
        return int("".join(ch for ch in self.dtype.split("_")[0] if ch.isdigit()) or 8)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LayerInfo:
    """A quantised linear layer or embedding (its vocabulary are the out_features).

    has_bias, has_in_scales: whether NAME.bias and NAME.in_scales exist.
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool
    scheme: Scheme | GridScheme
    has_in_scales: bool = False


def in_block(name: str) -> bool:
    """Whether a layer is one of many: their names have a number, those of the others have none."""
    return any(part.isdigit() for part in name.split("."))


@dataclass(frozen=True)
class StoredModel:
    """An opened model folder. `layers` are the quantised ones, none in a dense model. PARTS are the
    tensors of such a layer that stand for its weight; the second is in its floating type."""

    path: Path
    config: dict[str, Any]
    layers: dict[str, LayerInfo]
    tensors: dict[str, TensorInfo] = field(repr=False)

    PARTS: ClassVar[tuple[str, ...]] = ()

    def read(self, name: str) -> Tensor:
        """Read one tensor. Raises CheckpointError when absent or not finite."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        with safe_open(info.file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{info.file}: {name} holds values that are not finite")
        return tensor

    def read_layer(self, name: str) -> Any:
        """Read and check one quantised layer."""
        raise NotImplementedError

    @property
    def schemes(self) -> list[Scheme | GridScheme]:
        """The different schemes of its layers, that of most weights first."""
        weights: dict[Scheme | GridScheme, int] = {}
        for layer in self.layers.values():
            size = layer.out_features * layer.in_features
            weights[layer.scheme] = weights.get(layer.scheme, 0) + size
        return sorted(weights, key=lambda scheme: -weights[scheme])

    @property
    def scheme_names(self) -> str:
        """Its schemes in one word: "2x8g8", "2x8g8+2x8g4"; "dense" without any."""
        return "+".join(map(str, self.schemes)) or "dense"

    def layer_bits(self, layer: LayerInfo) -> int:
        """Bits of one quantised layer, without its bias."""
        float_bits = self.tensors[f"{layer.name}.{self.PARTS[1]}"].float_bits
        bits = layer.scheme.layer_bits(layer.out_features, layer.in_features, float_bits)
        return bits + layer.has_in_scales * layer.in_features * float_bits

    def verify(self) -> None:
        """Read every tensor, and compare it with its SHA-256 in pvrt.json where there is one.

        Raises CheckpointError at the first that is not sound.
        """
        for name in self.layers:
            self.read_layer(name)
        hashes = self._hashes()
        for name in self.tensors if hashes else self.tensors.keys() - self._weights():
            tensor, file = self.read(name), self.tensors[name].file
            if hashes and tensor_sha256(tensor) != hashes.get(name):
                raise CheckpointError(
                    f"{file}: {name} is not what was written, by its SHA-256 in {MANIFEST_FILE}; "
                    "copy or download it again"
                )
        if lost := hashes.keys() - self.tensors.keys():
            raise CheckpointError(f"{self.path} lacks {min(lost)}, which {MANIFEST_FILE} names")

    def _hashes(self) -> dict[str, str]:
        """The SHA-256 of every tensor, as written; none in folders that are not ours."""
        file = self.path / MANIFEST_FILE
        hashes = read_json_object(file).get("tensor_sha256", {}) if file.exists() else {}
        if not isinstance(hashes, dict):
            raise CheckpointError(f"{file}: tensor_sha256 must map names to hashes")
        return hashes

    def linear_bits_per_weight(self) -> float:
        """Bits per weight over the quantised linears of all blocks, all that decoding needs
        included; over all quantised layers where none is in a block.
        """
        layers = [layer for layer in self.layers.values() if in_block(layer.name)]
        layers = layers or list(self.layers.values())
        weights = sum(layer.out_features * layer.in_features for layer in layers)
        return sum(map(self.layer_bits, layers)) / weights

    def file_bits_per_weight(self) -> float:
        """Bits of all weight files over all weights of the original model, head included."""
        dense = sum(self.tensors[name].elements for name in self.tensors.keys() - self._weights())
        return 8 * self.file_bytes() / (self._quantised_weights() + dense)

    def file_bytes(self) -> int:
        """Size of all weight files in bytes."""
        return sum(file.stat().st_size for file in {info.file for info in self.tensors.values()})

    def dense_bytes(self) -> dict[str, int]:
        """Bytes of every tensor that is not part of a quantised layer, largest first."""
        quantised = self._weights() | {f"{name}.bias" for name in self.layers}
        sizes = {
            name: info.elements * info.float_bits // 8
            for name, info in self.tensors.items()
            if name not in quantised
        }
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def _weights(self) -> set[str]:
        return {f"{name}.{part}" for name in self.layers for part in self.PARTS}

    def _quantised_weights(self) -> int:
        return sum(layer.out_features * layer.in_features for layer in self.layers.values())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; integers never do. Needs no memory, and knows
    no numbers of 8 bits.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def read_json_object(file: Path) -> dict[str, Any]:
    """What a file holds. Raises CheckpointError when it is missing or no JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing: not a model folder, or not written to its end"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found {type(value).__name__}")
    return value


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
