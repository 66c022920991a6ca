"""What the files of a model hold, and which tensors of the model that is.

transformers makes up what files lack, drops what it has no place for, and takes numbers of any type
for weights. Here all of that is an error or a note.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from pvrt.errors import SourceError

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Tables that old files hold and every model computes by itself.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|attn\.bias|attention\.bias)$")
_SCALES = re.compile(r"(^|[._])(scales?|scale_inv|absmax|qweight|qzeros|SCB|weight_packed)$")
_ROWS = 4096  # compared at once


@dataclass(frozen=True)
class StoredWeights:
    """Tensors by their keys in files, and the file of each.

    A weight is a tensor, or something that becomes one when it is indexed and says its
    `get_shape()` and `get_dtype()` before: a slice of safetensors.
    """

    weights: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, Path] = field(repr=False)

    @classmethod
    def open(cls, files: Sequence[Path]) -> "StoredWeights":
        """Of safetensors files; nothing but their headers is read."""
        weights, places = {}, {}
        for file in files:
            handle: Any = safe_open(file, framework="pt")
            for key in handle.keys():  # noqa: SIM118
                weights[key], places[key] = handle.get_slice(key), file
        return cls(weights, places)

    def shape(self, key: str) -> list[int]:
        """Shape of one tensor."""
        weight = self.weights[key]
        return list(weight.shape if isinstance(weight, Tensor) else weight.get_shape())

    def first_float(self) -> torch.dtype:
        """The first floating type that a model computes in; float32 where there is none."""
        found = (_FLOATS.get(_dtype_name(weight)) for weight in self.weights.values())
        return next((dtype for dtype in found if dtype is not None), torch.float32)

    def renamed(self, key: str, name: str) -> "StoredWeights":
        """The same tensors, one of them under another key."""
        weights, files = dict(self.weights), dict(self.files)
        weights[name], files[name] = weights.pop(key), files.pop(key)
        return StoredWeights(weights, files)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        if self.shape(one) != self.shape(other):
            return False
        a, b = self.weights[one], self.weights[other]
        starts = range(0, self.shape(one)[0], _ROWS)
        return all(torch.equal(a[n : n + _ROWS], b[n : n + _ROWS]) for n in starts)

    def not_finite(self, keys: Sequence[str], dtype: torch.dtype) -> SourceError:
        """The sentence about tensors that make one of `dtype` with numbers that are not finite."""
        for key in keys:
            tensor = self.weights[key][...]
            bad = (~torch.isfinite(tensor.to(dtype))).nonzero()
            if len(bad):
                place, value = bad[0].tolist(), float(tensor[tuple(bad[0].tolist())])
                advice = "copy or download it again"
                if abs(value) < float("inf"):
                    kind = str(dtype).removeprefix("torch.")
                    advice = f"beyond {kind}; give config.json a wider dtype"
                return SourceError(f"{self.files[key]}: {key} holds {value} at {place}: {advice}")
        return SourceError(f"{self.files[keys[0]]}: {keys[0]} makes numbers that are not finite")


@dataclass(frozen=True)
class Assigned:
    """keys: of files, by the tensor of the model that they make up. renamed: the one key of tensors
    that files only call otherwise. left_out: keys that the model has no place for."""

    keys: Mapping[str, list[str]]
    renamed: Mapping[str, str]
    left_out: tuple[str, ...]


def assign(model: Any, stored: StoredWeights, transforms: Sequence[Any], name: str) -> Assigned:
    """Which tensors of files make up each tensor of a model; `name` is for errors.

    Raises SourceError when the files lack one, when one has another shape or is stored in a type
    that is no weight's, and for the scales of quantised weights.
    """
    wanted, tied = model.state_dict(), model.all_tied_weights_keys
    keys: dict[str, list[str]] = {}
    plain = set()
    for key, target, merged in _targets(model, stored, transforms):
        keys.setdefault(target, []).append(key)
        if not merged:
            plain.add(target)
    left_out = tuple(
        key
        for target, found in keys.items()
        if target not in wanted and not _COMPUTED.search(target)
        for key in found
    )
    for key in left_out:
        if _SCALES.search(key):
            raise SourceError(
                f"{stored.files[key]}: {key} is of quantised weights, and config.json has no "
                "quantization_config; give the original, dense model"
            )
    optional = model._keys_to_ignore_on_load_missing or []
    for target, tensor in wanted.items():
        if target not in keys:
            if target not in tied and not any(re.search(p, target) for p in optional):
                raise SourceError(
                    f"{name} holds no weights for {target}, which its config asks for"
                )
            continue
        for key in keys[target]:
            kind = _dtype_name(stored.weights[key])
            if tensor.is_floating_point() and kind not in _FLOATS:
                raise SourceError(
                    f"{stored.files[key]}: {key} is stored as {kind}, which config.json does not "
                    "explain; give the original, dense model"
                )
        shape = stored.shape(keys[target][0])
        if target in plain and shape != list(tensor.shape):
            raise SourceError(
                f"{name}: {target} has shape {shape}, its config asks for {list(tensor.shape)}"
            )
    own = {target: keys[target] for target in wanted if target in keys and target not in tied}
    renamed = {
        target: own[target][0]
        for target in plain & own.keys()
        if not target.endswith(own[target][0])  # the base model's prefix is no other name
    }
    return Assigned(own, renamed, left_out)


def embeddings_first(model: Any, stored: StoredWeights, transforms: Sequence[Any]) -> StoredWeights:
    """The same tensors; one that files hold only as an output head is the embedding tied to it."""
    first = {target: key for key, target, _ in _targets(model, stored, transforms)}
    for target, source in model.all_tied_weights_keys.items():
        if target in first and source not in first:
            stored = stored.renamed(first.pop(target), source)
            first[source] = source
    return stored


def untied(model: Any, stored: StoredWeights, transforms: Sequence[Any]) -> list[str]:
    """Tensors that the model ties to others, and of which the files hold other numbers."""
    first = {target: key for key, target, _ in _targets(model, stored, transforms)}
    return [
        target
        for target, source in model.all_tied_weights_keys.items()
        if target in first and source in first and not stored.same(first[target], first[source])
    ]


def _targets(
    model: Any, stored: StoredWeights, transforms: Sequence[Any]
) -> Iterator[tuple[str, str, bool]]:
    """(key, tensor of the model, whether it is only a part of that) of all stored tensors."""
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    wanted = model.state_dict()
    for key in stored.weights:
        target, merged = rename_source_key(
            key, renamings, converters, model.base_model_prefix, wanted
        )
        yield key, target if target in wanted else key, merged is not None


def _dtype_name(weight: Any) -> str:
    """The type of a weight by its safetensors name."""
    if isinstance(weight, Tensor):
        return next((name for name, kind in _FLOATS.items() if kind is weight.dtype), "other")
    return str(weight.get_dtype())


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of what `sha256sum FILES` prints."""
    lines = ""
    for file in files:
        with file.open("rb") as handle:
            lines += f"{hashlib.file_digest(handle, 'sha256').hexdigest()}  {file.name}\n"
    return hashlib.sha256(lines.encode()).hexdigest()
