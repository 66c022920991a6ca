"""What the GPU kernels share: which rows a program takes, and how the parts of a sum meet."""

import triton
import triton.language as tl


@triton.jit
def row_tile(tile, rows, end0, end1, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """(partition, first row, end of the partition's rows) of a tile of ROWS rows.

    Tiles never straddle partitions; these are rows [0, end0), [end0, end1) and [end1, rows).
    """
    part = 0
    row = tile * ROWS
    end = rows
    if PARTS > 1:
        tiles0 = tl.cdiv(end0, ROWS)
        if PARTS == 2:
            end1 = rows
        tiles1 = tiles0 + tl.cdiv(end1 - end0, ROWS)
        in1 = tile >= tiles0
        row = tl.where(in1, end0 + (tile - tiles0) * ROWS, row)
        end = tl.where(in1, end1, end0)
        part = in1.to(tl.int32)
        if PARTS == 3:
            in2 = tile >= tiles1
            row = tl.where(in2, end1 + (tile - tiles1) * ROWS, row)
            end = tl.where(in2, rows, end)
            part += in2.to(tl.int32)
    return part, row, end


@triton.jit
def load_rest(rest_ptr, block, n, mask, rows, CODEBOOKS: tl.constexpr, REST: tl.constexpr):
    """Words of rows n in a small block, [n, 4 REST / CODEBOOKS] int32; 0 where mask [n] is not set.

    The small blocks are [blocks, rows, 4 REST / CODEBOOKS] int32 (`layout.py`).
    """
    words = 0
    if REST > 0:
        WORDS: tl.constexpr = 4 * REST // CODEBOOKS
        at = rest_ptr + (block * rows.to(tl.int64) + n)[:, None] * WORDS
        words = tl.load(at + tl.arange(0, WORDS)[None, :], mask=mask[:, None], other=0)
    return words


@triton.jit
def finish(
    sums,
    n,
    end,
    scales_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    rows,
    tokens,
    split,
    TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """Scale, add the bias, round once and store sums[t][i] as y[t, n[i]], t < tokens, n < end.

    With split > 1 the programs of a row tile (axis 1 of the grid) add up in partial (float32):
    [tokens, rows] by atomic additions to zeros, or, ORDERED, [split, tokens, rows] of any content
    summed in the order of programs, so that the result is the same in every run. The program that
    arrives last (arrived: int32 counters per row tile, zero) stores y and leaves zeros as it found.
    """
    mask = n < end
    scale = tl.load(scales_ptr + n, mask=mask, other=0.0).to(tl.float32)
    bias = tl.zeros_like(scale)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    if split == 1:
        for t in tl.static_range(TOKENS):
            y = (sums[t] * scale + bias).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + t * rows + n, y, mask=n < tl.where(t < tokens, end, 0))
    else:
        for t in tl.static_range(TOKENS):
            taken = n < tl.where(t < tokens, end, 0)
            if ORDERED:
                mine = partial_ptr + (tl.program_id(1) * tokens + t).to(tl.int64) * rows
                tl.store(mine + n, sums[t], mask=taken)
            else:
                tl.atomic_add(partial_ptr + t * rows + n, sums[t], mask=taken, sem="relaxed")
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel")
        if arrived == split - 1:
            for t in tl.static_range(TOKENS):
                taken = n < tl.where(t < tokens, end, 0)
                at = partial_ptr + t * rows + n
                total = tl.load(at, mask=taken, other=0.0, cache_modifier=".cg")
                if ORDERED:
                    for _ in range(1, split):
                        at += tokens * rows
                        total += tl.load(at, mask=taken, other=0.0, cache_modifier=".cg")
                else:
                    tl.store(at, tl.zeros_like(total), mask=taken)
                y = (total * scale + bias).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + t * rows + n, y, mask=taken)
            tl.store(arrived_ptr + tl.program_id(0), 0)
