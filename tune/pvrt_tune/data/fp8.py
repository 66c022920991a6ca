"""Originals that are published in FP8 only: dequantised tensor by tensor as they are read.

Beside `NAME.weight` [out, in] in E4M3 lies `NAME.weight_scale_inv` (`weight_scale` in some):
[ceil(out/R), ceil(in/C)] for blocks of R x C, or one number, by which the weight is multiplied
(DeepSeek-V3's layout: arXiv 2412.19437, section 3.3, and its published config.json).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvrt.errors import SourceError
from pvrt_tune.data.stored_weights import StoredWeights

NAME = "FP8"
_KINDS = ("F8_E4M3", "F8_E5M2")
_SUFFIXES = ("_scale_inv", "_scale")
_OF_INPUTS = re.compile(r"\.(input|activation)_scale(_inv)?$")


def reads(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` of config.json is of this layout."""
    return quantization.get("quant_method") == "fp8"


def dequantised(stored: StoredWeights, quantization: Mapping[str, Any]) -> StoredWeights:
    """The same tensors, FP8 weights and their scales become bfloat16 weights when they are read.

    Raises SourceError for a weight without scales, and for scales of another shape than the blocks.
    """
    size = quantization.get("weight_block_size")
    weights = {k: w for k, w in stored.weights.items() if not _OF_INPUTS.search(k)}
    for key, weight in list(weights.items()):
        if weight.get_dtype() not in _KINDS:
            continue
        found = [f"{key}{suffix}" for suffix in _SUFFIXES if f"{key}{suffix}" in weights]
        if not found:
            raise SourceError(
                f"{stored.files[key]}: {key} is stored as {weight.get_dtype()} without scales; "
                "copy or download the model again"
            )
        weights[key] = _Scaled(weight, weights.pop(found[0]), size)
        if not weights[key].fits:
            raise SourceError(
                f"{stored.files[key]}: {found[0]} has another shape than blocks of {size} of "
                f"{key} have; copy or download the model again"
            )
    return StoredWeights(weights, stored.files)


@dataclass(frozen=True)
class _Scaled:
    """A weight and its scales, as one slice of bfloat16."""

    weight: Any
    scales: Any
    block: list[int] | None

    @property
    def fits(self) -> bool:
        shape, scales = self.get_shape(), list(self.scales.get_shape())
        if self.block is None or len(scales) < 2:
            return scales in ([], [1], [1, 1], [shape[0], 1])
        lead = shape[: len(shape) - 2]
        blocks = zip(shape[-2:], self.block, strict=True)
        return scales == [*lead, *(-(-length // step) for length, step in blocks)]

    def get_shape(self) -> list[int]:
        return list(self.weight.get_shape())

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> Tensor:
        dense: Tensor = self.weight[...].float()
        scales: Tensor = self.scales[...].float()
        if self.block is not None and scales.dim() >= 2:
            for axis, step in zip((-2, -1), self.block, strict=True):
                length = dense.shape[axis]
                scales = scales.repeat_interleave(step, axis).narrow(axis, 0, length)
        return dense.mul_(scales).to(torch.bfloat16)[index]
