"""Weights as the C library reads them: packed layouts, and views of their memory.

Codes of up to 8 bits go in tiles for table lookups (csrc/cpu.h), longer ones stay as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pvrt_kernels.cpu import library
from pvrt_kernels.cpu.library import TYPES, PlainWeight, TiledWeight

TILE, ENTRIES = 64, 256


def as_fp32(tensor: Tensor) -> Tensor:
    """Contiguous, without gradients."""
    return tensor.detach().to(torch.float32).contiguous()


class CpuTiles(NamedTuple):
    """A weight with codes of up to 8 bits, for table lookups; all contiguous, on the CPU.

    codes uint8 in tiles (cpu.h), codebooks [P, M, 2^B, 1, g] and scales [out, 1, 1, 1] as given,
    fp32_scales [out], rows [P] int64, tables [P, M, g, 256] fp32.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    fp32_scales: Tensor
    rows: Tensor
    tables: Tensor


class CpuWords(NamedTuple):
    """A weight with codes of 9 to 16 bits, decoded codeword by codeword; contiguous, on the CPU.

    codes [out, in/g, M] int16, the rest as in `CpuTiles`.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    fp32_scales: Tensor
    rows: Tensor


def pack_tiles(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> CpuTiles:
    parts, books, size = codebooks.shape[:3]
    rows = torch.tensor(partition_sizes)
    tiles = sum(-(-n // TILE) for n in partition_sizes)
    packed = torch.empty(tiles * TILE * codes.shape[1] * books, dtype=torch.uint8)
    plain = codes.detach().to(torch.int8).contiguous()
    library.library().pvrt_tile_codes(
        plain.data_ptr(), packed.data_ptr(), rows.data_ptr(), parts, codes.shape[1], books, 0
    )
    entries = torch.arange(ENTRIES) % size  # a stored byte v means v mod size
    tables = codebooks.detach().float()[:, :, entries, 0].transpose(2, 3).contiguous()
    given = codebooks.detach().clone().contiguous(), scales.detach().clone()
    return CpuTiles(packed, *given, as_fp32(scales).flatten(), rows, tables)


def unpack_tiles(packed: CpuTiles, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    parts, books, _, _, group = packed.codebooks.shape
    out = packed.scales.shape[0]
    codes = torch.empty(out, in_features // group, books, dtype=torch.int8)
    library.library().pvrt_tile_codes(
        codes.data_ptr(),
        packed.codes.data_ptr(),
        packed.rows.data_ptr(),
        parts,
        codes.shape[1],
        books,
        1,
    )
    return codes, packed.codebooks, packed.scales


def pack_words(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> CpuWords:
    return CpuWords(
        codes.detach().to(torch.int16, copy=True).contiguous(),
        codebooks.detach().clone().contiguous(),
        scales.detach().clone(),
        as_fp32(scales).flatten(),
        torch.tensor(partition_sizes),
    )


def unpack_words(packed: CpuWords, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    return packed.codes, packed.codebooks, packed.scales


def tiled_view(packed: CpuTiles, in_features: int) -> TiledWeight:
    """The C view of a packed weight; valid as long as its tensors live."""
    parts, books, _, _, group = packed.codebooks.shape
    return TiledWeight(
        packed.codes.data_ptr(),
        packed.tables.data_ptr(),
        packed.fp32_scales.data_ptr(),
        packed.rows.data_ptr(),
        parts,
        books,
        group,
        in_features // group,
    )


def plain_view(packed: CpuTiles | CpuWords, in_features: int) -> PlainWeight:
    """The C view of a packed weight for decoding; valid as long as its tensors live."""
    return plain_weight(
        packed.codes,
        packed.codebooks,
        packed.fp32_scales,
        packed.rows,
        in_features,
        isinstance(packed, CpuTiles),
    )


def plain_weight(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    rows: Tensor,
    in_features: int,
    tiled: bool = False,
) -> PlainWeight:
    """The C view of a weight in the checkpoint's layout; valid as long as its tensors live."""
    parts, books, size, _, group = codebooks.shape
    return PlainWeight(
        codes.data_ptr(),
        codebooks.data_ptr(),
        scales.data_ptr(),
        rows.data_ptr(),
        parts,
        books,
        group,
        in_features // group,
        size,
        1 if tiled else codes.element_size(),
        TYPES[codebooks.dtype],
        tiled,
    )
