"""Originals whose experts are published in MXFP4: dequantised expert by expert as they are read.

Beside `NAME_blocks` [experts, out, in/32, 16] (two codes of four bits a byte, the low one first)
lies `NAME_scales` [experts, out, in/32]: powers of two, with a bias of 127. A code is a sign and a
number of E2M1 (OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4). NAME is [experts, in, out].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvrt.errors import SourceError
from pvrt_tune.data.stored_weights import StoredWeights

NAME = "MXFP4"
_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", 127
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCK = 32


def reads(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` of config.json is of this layout."""
    return quantization.get("quant_method") == "mxfp4"


def dequantised(stored: StoredWeights, quantization: Mapping[str, Any]) -> StoredWeights:
    """The same tensors, blocks and their scales become bfloat16 weights when they are read.

    Raises SourceError for blocks without scales, and for blocks or scales of another shape.
    """
    weights, files = dict(stored.weights), dict(stored.files)
    for key in stored.weights:
        if not key.endswith(_BLOCKS):
            continue
        name = key.removesuffix(_BLOCKS)
        blocks, scales = weights.pop(key), weights.pop(f"{name}{_SCALES}", None)
        shape = stored.shape(key)
        fits = len(shape) == 4 and shape[3] == _BLOCK // 2
        if scales is None or not fits or list(scales.get_shape()) != shape[:3]:
            raise SourceError(
                f"{stored.files[key]}: {key} has no scales, or is not in blocks of {_BLOCK}; copy "
                "or download the model again"
            )
        weights[name], files[name] = _Packed(blocks, scales), files[key]
    return StoredWeights(weights, files)


@dataclass(frozen=True)
class _Packed:
    """Blocks and their scales, as one slice of bfloat16."""

    blocks: Any
    scales: Any

    def get_shape(self) -> list[int]:
        experts, out, blocks, _ = self.blocks.get_shape()
        return [experts, blocks * _BLOCK, out]

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> Tensor:
        expert, rest = index, ...
        if not isinstance(index, int):
            expert, rest = ..., index
        packed: Tensor = self.blocks[expert]
        values = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        exponents = self.scales[expert].int() - _BIAS
        dense = torch.ldexp(values[codes.int()], exponents.unsqueeze(-1))
        return dense.flatten(-2).transpose(-1, -2).to(torch.bfloat16)[rest]
