"""Decoding whole tiles: products with 5 to some hundred tokens on tensor cores, and `decode_rows`.

y^T = W x^T, with the weight as the left operand: the number of tokens, small here, is then the
side of the product that may be as narrow as 8. Each tile of W is decoded into registers, 16 bytes
of codes per row and step, and goes to the tensor cores through shared memory. Beyond the crossover
of its configuration the weight is better decoded once, by `decode_rows`, and multiplied by cuBLAS.
"""

import triton
import triton.language as tl

from pvrt_kernels.gpu.lut_gemv import UNSPECIALISED
from pvrt_kernels.gpu.split_k import load_rest, row_tile


@triton.jit
def codewords(codes, table, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """codes [ROWS, groups] -> their codewords [ROWS, groups, GROUP] in float32."""
    at = table + codes[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    if SIZE > 256:  # a table of 1 MiB would only evict what L1 holds
        w = tl.load(at, cache_modifier=".cg")
    else:
        w = tl.load(at, eviction_policy="evict_last")
    return w.to(tl.float32)


@triton.jit
def add_codewords(
    w,
    words,
    table,
    CODEBOOKS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """w [ROWS, groups, GROUP] plus the codewords of words [ROWS, any], CODEBOOKS per group."""
    if SIZE > 256:
        codes = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
        GROUPS: tl.constexpr = 2 * words.shape[1] // CODEBOOKS
    else:
        even = tl.join(words & 255, (words >> 16) & 255)
        odd = tl.join((words >> 8) & 255, (words >> 24) & 255)
        codes = tl.join(even, odd)
        GROUPS: tl.constexpr = 4 * words.shape[1] // CODEBOOKS
    if CODEBOOKS == 1:
        w += codewords(tl.reshape(codes, (ROWS, GROUPS)), table, SIZE, GROUP)
    elif CODEBOOKS == 2:
        codes0, codes1 = tl.split(tl.reshape(codes, (ROWS, GROUPS, 2)))
        w += codewords(codes0, table, SIZE, GROUP)
        w += codewords(codes1 + SIZE, table, SIZE, GROUP)
    else:
        codes02, codes13 = tl.split(tl.reshape(codes, (ROWS, GROUPS, 2, 2)))
        codes0, codes2 = tl.split(codes02)
        codes1, codes3 = tl.split(codes13)
        w += codewords(codes0, table, SIZE, GROUP)
        w += codewords(codes1 + SIZE, table, SIZE, GROUP)
        w += codewords(codes2 + 2 * SIZE, table, SIZE, GROUP)
        w += codewords(codes3 + 3 * SIZE, table, SIZE, GROUP)
    return w


@triton.jit
def decode_block(
    words,
    rest,
    table,
    CODEBOOKS: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """words [ROWS, 4] and rest [ROWS, 4 REST / CODEBOOKS] int32, one block of codes -> weights.

    A block holds 16 / CODEBOOKS groups of 8-bit codes or 8 / CODEBOOKS of 16-bit codes; the
    weights are [ROWS, columns] float32, not yet scaled.
    """
    GROUPS: tl.constexpr = (16 if SIZE <= 256 else 8) // CODEBOOKS
    w = tl.zeros((ROWS, GROUPS, GROUP), dtype=tl.float32)
    w = add_codewords(w, words, table, CODEBOOKS, SIZE, GROUP, ROWS)
    if REST > 0:
        w = add_codewords(w, rest, table + CODEBOOKS * SIZE * GROUP, REST, SIZE, GROUP, ROWS)
    return tl.reshape(w, (ROWS, GROUPS * GROUP))


@triton.jit(do_not_specialize=UNSPECIALISED)
def tile_gemm(
    x_ptr,
    words_ptr,
    rest_ptr,
    codebooks_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    rows,
    groups,
    tokens,
    end0,
    end1,
    split,
    TOKENS: tl.constexpr,
    CODEBOOKS: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (row tiles, split, tiles of TOKENS tokens); (i, s, j) sums blocks s, s + split...

    As `lut_gemv`, with any number of tokens and TOKENS at least 8; SIZE up to 65536. Several tiles
    of tokens need split = 1.
    """
    part, row, end = row_tile(tl.program_id(0), rows, end0, end1, PARTS, ROWS)
    CODES: tl.constexpr = 16 if SIZE <= 256 else 8
    GROUPS: tl.constexpr = CODES // CODEBOOKS
    DEPTH: tl.constexpr = GROUPS * GROUP
    n = row + tl.arange(0, ROWS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, DEPTH)
    at = words_ptr + n.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    stride = rows.to(tl.int64) * 4
    count = tl.cdiv(groups, GROUPS)
    first = tl.program_id(1)
    table = codebooks_ptr + part * ((CODEBOOKS + REST) * SIZE * GROUP)
    x_at = x_ptr + (m * groups)[:, None] * GROUP + k[None, :]
    words = tl.load(
        at + first * stride, mask=(n < end)[:, None], other=0, eviction_policy="evict_first"
    )
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for b in range(first, count, split):
        ahead = tl.load(
            at + (b + split) * stride,
            mask=(n < tl.where(b + split < count, end, 0))[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        inside = (m < tokens)[:, None] & (b * GROUPS + k // GROUP < groups)[None, :]
        x = tl.load(x_at + b * DEPTH, mask=inside, other=0.0)
        rest = load_rest(rest_ptr, b, n, n < end, rows, CODEBOOKS, REST)
        w = decode_block(words, rest, table, CODEBOOKS, REST, SIZE, GROUP, ROWS).to(x.dtype)
        sums = tl.dot(w, tl.trans(x), sums)
        words = ahead
    scale = tl.load(scales_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    bias = tl.zeros_like(scale)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < end, other=0.0).to(tl.float32)
    taken = (n < end)[:, None] & (m < tokens)[None, :]
    place = m[None, :] * rows + n[:, None]
    last = True
    if split > 1:  # as in split_k.finish
        tl.atomic_add(partial_ptr + place, sums, mask=taken, sem="relaxed")
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel") == split - 1
        if last:
            sums = tl.load(partial_ptr + place, mask=taken, other=0.0, cache_modifier=".cg")
            tl.store(partial_ptr + place, tl.zeros_like(sums), mask=taken)
            tl.store(arrived_ptr + tl.program_id(0), 0)
    if last:
        y = sums * scale[:, None] + bias[:, None]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=taken)


@triton.jit(do_not_specialize=["rows", "groups", "first_row", "end_row", "count"])
def decode_rows(
    words_ptr,
    rest_ptr,
    codebook_ptr,
    scales_ptr,
    numbers_ptr,
    weight_ptr,
    rows,
    groups,
    first_row,
    end_row,
    count,
    CODEBOOKS: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BY_NUMBER: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (tiles of `count` results, blocks): decode rows first_row..end_row of one partition.

    words [blocks, rows, 4] int32 and rest as in `load_rest`, codebook [CODEBOOKS + REST, SIZE,
    GROUP], scales [rows] -> weight [count, groups * GROUP]; sums and scaling in float32, rounded
    once. BY_NUMBER, result i is row numbers[i] (int64), and is left as it is if that is another's.
    """
    DEPTH: tl.constexpr = (16 if SIZE <= 256 else 8) // CODEBOOKS * GROUP
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.load(numbers_ptr + i, mask=i < count, other=-1) if BY_NUMBER else first_row + i
    taken = (i < count) & (n >= first_row) & (n < end_row)
    b = tl.program_id(1)
    at = words_ptr + (b * rows.to(tl.int64) + n)[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = tl.load(at, mask=taken[:, None], other=0, eviction_policy="evict_first")
    rest = load_rest(rest_ptr, b, n, taken, rows, CODEBOOKS, REST)
    w = decode_block(words, rest, codebook_ptr, CODEBOOKS, REST, SIZE, GROUP, ROWS)
    w *= tl.load(scales_ptr + n, mask=taken, other=0.0).to(tl.float32)[:, None]
    k = tl.arange(0, DEPTH)
    inside = taken[:, None] & (b * (DEPTH // GROUP) + k // GROUP < groups)[None, :]
    row_at = weight_ptr + (i.to(tl.int64) * groups)[:, None] * GROUP
    tl.store(row_at + b * DEPTH + k[None, :], w.to(weight_ptr.dtype.element_ty), mask=inside)
