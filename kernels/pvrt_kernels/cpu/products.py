"""Products on CPUs, in C: the kernels of the registry and what else decodes.

`cpu` multiplies by weights in the checkpoint's layout. Of packed weights `cpu-tiles` takes those
with codes of up to 8 bits (through lookup tables, see csrc/cpu.h), `cpu-words` those with longer
ones. All sums are fp32; `rounding.py` bounds the errors.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt_kernels import reference
from pvrt_kernels.cpu import library
from pvrt_kernels.cpu.layouts import (
    ENTRIES,
    TILE,
    CpuTiles,
    CpuWords,
    as_fp32,
    pack_tiles,
    pack_words,
    plain_view,
    plain_weight,
    tiled_view,
    unpack_tiles,
    unpack_words,
)
from pvrt_kernels.cpu.library import TYPES, PlainWeight
from pvrt_kernels.dispatch import Kernel, PackedKernel, Problem, registry

# Rows decoded at a time for a dense product: 1 MiB of fp32 stays in the second-level cache.
_PANEL_BYTES = 1 << 20
# From this many tokens on, decoding rows of long codes once costs less than for every token.
_MANY = 4
# What one token costs per weight, in lookups: a dense product in fp32 and in bfloat16; and what
# decoding costs once, per codebook. Measured on Zen 5, in shapes of 135M to 8B models.
_DENSE, _DENSE_BF16, _DECODING = 0.8, 0.3, 6
_FEWEST_DECODED = 16
# Lookups of plain C take so many times as long.
_PORTABLE = 8


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _supports(problem: Problem) -> bool:
    return (
        problem.device_type == "cpu"
        and problem.out_group_size == 1
        and problem.dtype in TYPES
        and library.library() is not None
    )


def _supports_tiles(problem: Problem) -> bool:
    return _supports(problem) and problem.codebook_size <= ENTRIES


def _supports_words(problem: Problem) -> bool:
    return _supports(problem) and problem.codebook_size > ENTRIES


def _by_panels(x: Tensor, weight: PlainWeight, out: int, bias: Tensor | None) -> Tensor:
    """x [tokens, in] times rows that are decoded panel by panel, while they are in the cache; all
    fp32.
    """
    lib, threads, features = library.library(), torch.get_num_threads(), x.shape[1]
    step = max(64, _PANEL_BYTES // (4 * features))
    panel, y = torch.empty(min(step, out), features), torch.empty(x.shape[0], out)
    for first in range(0, out, step):
        count = min(step, out - first)
        lib.pvrt_decode_rows(ctypes.byref(weight), None, first, count, panel.data_ptr(), threads)
        part = None if bias is None else bias[first : first + count]
        y[:, first : first + count] = F.linear(x, panel[:count], part)
    return y


def _linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    partition_sizes: list[int],
) -> Tensor:
    codes, books, fp32_scales = codes.contiguous(), codebooks.contiguous(), as_fp32(scales)
    if books.dtype not in TYPES:
        return reference.linear(x, codes, codebooks, scales, bias, partition_sizes)
    rows = torch.tensor(partition_sizes)
    weight = plain_weight(codes, books, fp32_scales, rows, x.shape[-1])
    return _multiply_plain(x, weight, codes.shape[0], bias)


def _multiply_plain(x: Tensor, weight: PlainWeight, out: int, bias: Tensor | None) -> Tensor:
    flat = as_fp32(x.reshape(-1, x.shape[-1]))
    fp32_bias = None if bias is None else as_fp32(bias)
    if flat.shape[0] >= _MANY:
        y = _by_panels(flat, weight, out, fp32_bias)
    else:
        y = torch.empty(flat.shape[0], out)
        library.library().pvrt_plain_linear(
            ctypes.byref(weight),
            flat.data_ptr(),
            _pointer(fp32_bias),
            y.data_ptr(),
            flat.shape[0],
            torch.get_num_threads(),
        )
    return y.to(x.dtype).reshape(*x.shape[:-1], out)


def _tiles_linear(
    x: Tensor, packed: CpuTiles, bias: Tensor | None, partition_sizes: list[int]
) -> Tensor:
    in_features, out = x.shape[-1], packed.fp32_scales.shape[0]
    flat = x.reshape(-1, in_features)
    tokens = flat.shape[0]
    dtype = torch.bfloat16 if may_round(x.dtype) else torch.float32
    if _decoding_pays(tokens, packed, dtype):
        y = _by_decoded_tiles(flat, packed, bias, partition_sizes, dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], out)
    flat = as_fp32(flat)
    fp32_bias = None if bias is None else as_fp32(bias)
    y = torch.empty(tokens, out)
    library.library().pvrt_tiled_linear(
        ctypes.byref(tiled_view(packed, in_features)),
        flat.data_ptr(),
        _pointer(fp32_bias),
        y.data_ptr(),
        tokens,
        torch.get_num_threads(),
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], out)


def may_round(dtype: torch.dtype) -> bool:
    """Whether inputs and decoded weights may be rounded to bfloat16 for many tokens of a type.

    Where that is fast, and for fp32 only where torch was allowed the same
    (torch.set_float32_matmul_precision("medium")).
    """
    allowed = dtype == torch.bfloat16 or (
        dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    )
    return allowed and multiplies_bfloat16()


def _decoding_pays(tokens: int, packed: CpuTiles, dtype: torch.dtype) -> bool:
    """Whether decoding rows and a dense product cost less than lookups for every token."""
    parts, books, group, _ = packed.tables.shape
    if tokens < _FEWEST_DECODED or group % 4:
        return False
    # Tables of one input group serve all outputs of a partition.
    lookups = books * (1 / group + ENTRIES * parts / packed.fp32_scales.shape[0])
    lookups *= _PORTABLE if library.instruction_set() == "portable" else 1
    dense = _DENSE_BF16 if dtype == torch.bfloat16 else _DENSE
    return tokens * lookups > tokens * dense + _DECODING * books


def _by_decoded_tiles(
    x: Tensor,
    packed: CpuTiles,
    bias: Tensor | None,
    partition_sizes: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """x [tokens, in] times tiles that are decoded in `dtype`, while they are in the cache; fp32."""
    lib, threads, features = library.library(), torch.get_num_threads(), x.shape[1]
    out, half = packed.fp32_scales.shape[0], dtype == torch.bfloat16
    view, books = tiled_view(packed, features), packed.tables.mT.contiguous()
    step = max(threads, _PANEL_BYTES // (TILE * features * dtype.itemsize))
    panel = torch.empty(step * TILE, features, dtype=dtype)
    x, y, row = x.to(dtype), torch.empty(x.shape[0], out), 0
    sizes = [min(TILE, rows - done) for rows in partition_sizes for done in range(0, rows, TILE)]
    for first in range(0, len(sizes), step):
        tiles = sizes[first : first + step]
        lib.pvrt_decode_tiles(
            ctypes.byref(view), books.data_ptr(), first, len(tiles), panel.data_ptr(), half, threads
        )
        end = row + sum(tiles)
        y[:, row:end] = F.linear(x, panel[: end - row])
        row = end
    return y if bias is None else y.add_(bias)


def _words_linear(
    x: Tensor, packed: CpuWords, bias: Tensor | None, partition_sizes: list[int]
) -> Tensor:
    weight = plain_view(packed, x.shape[-1])
    return _multiply_plain(x, weight, packed.fp32_scales.shape[0], bias)


def _packed_dequantize(
    packed: CpuTiles | CpuWords, partition_sizes: list[int], in_features: int
) -> Tensor:
    out = packed.fp32_scales.shape[0]
    weight = _decoded(plain_view(packed, in_features), out, in_features)
    return weight.to(packed.codebooks.dtype)


def _packed_rows(
    packed: CpuTiles | CpuWords,
    numbers: Tensor,
    partition_sizes: list[int],
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    weight, count = plain_view(packed, in_features), numbers.shape[0]
    return _decoded(weight, count, in_features, numbers.contiguous()).to(dtype)


def can_decode(codes: Tensor, codebooks: Tensor) -> bool:
    """Whether `dequantize` takes codes [out, in/g, M] and codebooks [P, M, K, 1, g]."""
    return (
        codes.device.type == "cpu"
        and codes.element_size() <= 2
        and codebooks.shape[3] == 1
        and codebooks.dtype in TYPES
        and library.library() is not None
    )


def dequantize(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> Tensor:
    """What `reference.dequantize` returns, to the bit."""
    codes, books, fp32_scales = codes.contiguous(), codebooks.contiguous(), as_fp32(scales)
    rows, in_features = torch.tensor(partition_sizes), codes.shape[1] * codebooks.shape[4]
    weight = plain_weight(codes, books, fp32_scales, rows, in_features)
    return _decoded(weight, len(codes), in_features).to(codebooks.dtype)


def _decoded(
    weight: PlainWeight, count: int, in_features: int, rows: Tensor | None = None
) -> Tensor:
    """The first `count` rows in fp32, or those of int64 numbers [count].

    Raises IndexError if one is not there.
    """
    y = torch.empty(count, in_features)
    if library.library().pvrt_decode_rows(
        ctypes.byref(weight), _pointer(rows), 0, count, y.data_ptr(), torch.get_num_threads()
    ):
        raise IndexError("a row was asked for that the weight does not have")
    return y


def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16, and an instruction set as new is in use."""
    return library.instruction_set() == library.INSTRUCTION_SETS[0] and _has_bfloat16()


@functools.cache
def _has_bfloat16() -> bool:
    try:
        found = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in found or "avx512_bf16" in found


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let products with many tokens round their factors to bfloat16, where that is faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, in] fp32 times a dense weight [out, in] of fp32, fp16 or bf16 -> fp32.

    For few tokens: a 16-bit weight is read as it is and summed in fp32, at memory speed.
    """
    y = torch.empty(x.shape[0], weight.shape[0])
    library.library().pvrt_dense_linear(
        weight.data_ptr(),
        x.contiguous().data_ptr(),
        y.data_ptr(),
        x.shape[0],
        weight.shape[0],
        weight.shape[1],
        TYPES[weight.dtype],
        torch.get_num_threads(),
    )
    return y


_PACKED = (
    PackedKernel(
        "cpu-tiles",
        _supports_tiles,
        CpuTiles,
        pack_tiles,
        unpack_tiles,
        _tiles_linear,
        _packed_dequantize,
        rows=_packed_rows,
    ),
    PackedKernel(
        "cpu-words",
        _supports_words,
        CpuWords,
        pack_words,
        unpack_words,
        _words_linear,
        _packed_dequantize,
        rows=_packed_rows,
    ),
)


def register() -> None:
    """Add all kernels to the registry; they take nothing where the library lacks."""
    if not library.LIBRARY.is_file():
        registry.suggest("cpu", library.REMEDY)
    registry.add(Kernel("cpu", _supports, _linear), *_PACKED)
