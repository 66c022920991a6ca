"""Designs that pvrt does not ship, to be timed beside its own kernels by `gpu.py`: one token.

`table_in_l1`: the tables of `lut_gemv` in a scratch that only their program reads, through L1,
instead of in shared memory; and the number of groups that one table covers as a choice.
`replicated`: decoding as in `direct_gemv`, neighbouring rows from different copies of the
codebooks, through L1. (Copies in shared memory are what the aqlm package's CUDA kernel has, which
`gpu.py` times as a peer: Triton loads single elements from there, no whole codewords.)
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvrt.tools.bench_kernels import blocks_of
from pvrt_kernels.gpu.choose import Gpu, best_split
from pvrt_kernels.gpu.lut_gemv import UNSPECIALISED, table_for_one
from pvrt_kernels.gpu.shared import shared
from pvrt_kernels.gpu.split_k import finish
from pvrt_kernels.packed import PackedWeight


@triton.jit
def store_one(total, n, rows, scales_ptr, y_ptr, partial_ptr, arrived_ptr, split):
    """`finish` for one token and partition without bias, in any order."""
    finish((total,), n, rows, scales_ptr, scales_ptr, y_ptr, partial_ptr, arrived_ptr, rows, 1,
           split, 1, False, False)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def table_in_l1(
    x_ptr,
    words_ptr,
    codebooks_ptr,
    scales_ptr,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    scratch_ptr,
    rows,
    groups,
    split,
    CODEBOOKS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """As `lut_gemv` with one token and partition; a table covers BLOCKS blocks of 16 bytes.

    scratch [programs, BLOCKS * 4096] fp32; CODEBOOKS in (1, 2, 4).
    """
    GROUPS: tl.constexpr = 16 // CODEBOOKS
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, GROUP)
    v = tl.arange(0, CODEBOOKS * 256)
    codebooks = tl.load(
        codebooks_ptr + (v // 256 * SIZE + v % 256)[:, None] * GROUP + e[None, :],
        mask=(v % 256 < SIZE)[:, None],
        other=0.0,
    )
    program = tl.program_id(0) * split + tl.program_id(1)
    table = scratch_ptr + program.to(tl.int64) * (BLOCKS * 4096)
    word = tl.arange(0, 4)[None, :]
    at = words_ptr + n.to(tl.int64)[:, None] * 4 + word
    stride = rows.to(tl.int64) * 4
    count = tl.cdiv(groups * CODEBOOKS, 16)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for b in range(tl.program_id(1) * BLOCKS, count, split * BLOCKS):
        tl.debug_barrier()  # all have read the table before
        for k in tl.static_range(BLOCKS):
            sums = table_for_one(codebooks, x_ptr, (b + k) * GROUPS, groups, GROUPS, GROUP, GROUP)
            tl.store(table + k * 4096 + tl.arange(0, 4096), sums)
        tl.debug_barrier()
        for k in tl.static_range(BLOCKS):
            codes = tl.load(
                at + (b + k) * stride,
                mask=(n < tl.where(b + k < count, rows, 0))[:, None],
                other=0,
                eviction_policy="evict_first",
            )
            here = table + (k * 4096 + word * 1024)
            found = tl.load(here + (codes & 255), eviction_policy="evict_last")
            for byte in tl.static_range(1, 4):
                code = (codes >> (8 * byte)) & 255
                found += tl.load(here + (byte * 256 + code), eviction_policy="evict_last")
            total += tl.sum(found, axis=1)
    store_one(total, n, rows, scales_ptr, y_ptr, partial_ptr, arrived_ptr, split)


@triton.jit(do_not_specialize=UNSPECIALISED)
def replicated(
    x_ptr,
    words_ptr,
    codebooks_ptr,
    scales_ptr,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    rows,
    groups,
    split,
    CODEBOOKS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """codebooks [COPIES, CODEBOOKS, SIZE, GROUP]; row n decodes from n % COPIES; one partition."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, GROUP)[None, :]
    copy = (n % COPIES)[:, None] * (CODEBOOKS * SIZE * GROUP)
    at = words_ptr + n.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
    count = tl.cdiv(groups * CODEBOOKS, 16)
    sums = tl.zeros((ROWS, GROUP), dtype=tl.float32)
    for b in range(tl.program_id(1), count, split):
        words = tl.load(
            at + b * rows.to(tl.int64) * 2,
            mask=(n < rows)[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        halves = tl.split(words)
        for i in tl.static_range(16):
            code = (halves[i // 8] >> (i % 8 * 8)).to(tl.int32) & (SIZE - 1)
            group = (b * 16 + i) // CODEBOOKS + tl.zeros((1, GROUP), dtype=tl.int32)
            entry = copy + ((i % CODEBOOKS) * SIZE + code)[:, None] * GROUP + e
            w = tl.load(codebooks_ptr + entry, eviction_policy="evict_last")
            x = tl.load(x_ptr + group * GROUP + e, mask=group < groups, other=0.0)
            sums += w.to(tl.float32) * x.to(tl.float32)
    store_one(tl.sum(sums, axis=1), n, rows, scales_ptr, y_ptr, partial_ptr, arrived_ptr, split)


def variants(
    card: Gpu, x: Tensor, weights: Sequence[PackedWeight]
) -> Iterator[tuple[dict[str, Any], list[Callable[[], Tensor]]]]:
    """(what it is, one call per weight) of every variant, for x [1, in] and 2^n 8-bit codebooks."""
    for rows, warps in ((1024, 8), (1024, 4)):
        for blocks in (1, 2, 4):
            name = {"kernel": "table_in_l1", "blocks": blocks, "rows": rows, "warps": warps}
            yield name, [partial(_in_l1, card, x, w, rows, warps, blocks) for w in weights]
    for copies in (1, 4, 8):
        name = {"kernel": "replicated", "copies": copies, "rows": 128, "warps": 4}
        codebooks = [blocks_of(w).codebooks.repeat(copies, 1, 1, 1) for w in weights]
        calls = zip(weights, codebooks, strict=True)
        yield name, [partial(_replicated, card, x, w, b, copies) for w, b in calls]


def _split(card: Gpu, weight: PackedWeight, rows: int, warps: int, blocks: int) -> tuple[int, int]:
    """(tiles of rows, programs per tile)."""
    count, out = blocks_of(weight).codes.shape[:2]
    tiles = -(-out // rows)
    return tiles, best_split(tiles, -(-count // blocks), card.sms * max(1, 16 // warps))


def _in_l1(
    card: Gpu, x: Tensor, weight: PackedWeight, rows: int, warps: int, blocks: int
) -> Tensor:
    tiles, split = _split(card, weight, rows, warps, blocks)
    scratch = x.new_empty(tiles * split * blocks * 4096, dtype=torch.float32)
    return _launch(table_in_l1, x, weight, blocks_of(weight).codebooks, (tiles, split), rows, warps,
                   (scratch,), {"BLOCKS": blocks})  # fmt: skip


def _replicated(
    card: Gpu, x: Tensor, weight: PackedWeight, codebooks: Tensor, copies: int
) -> Tensor:
    grid = _split(card, weight, 128, 4, 1)
    return _launch(replicated, x, weight, codebooks, grid, 128, 4, (), {"COPIES": copies})


def _launch(
    kernel: Any,
    x: Tensor,
    weight: PackedWeight,
    codebooks: Tensor,
    grid: tuple[int, int],
    rows: int,
    warps: int,
    more: tuple[Tensor, ...],
    constants: dict[str, int],
) -> Tensor:
    blocks, scales = blocks_of(weight).codes, blocks_of(weight).scales
    _, count, size, group = codebooks.shape
    out = blocks.shape[1]
    y = x.new_empty(1, out)
    sums, arrived = shared.workspace(x.device, out, grid[0])
    words = blocks.view(torch.int64 if kernel is replicated else torch.int32)
    kernel[grid](
        x, words, codebooks, scales, y, sums, arrived, *more, out, x.shape[1] // group, grid[1],
        CODEBOOKS=count, SIZE=size, GROUP=group, ROWS=rows, **constants,
        num_warps=warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y
