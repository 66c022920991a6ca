"""Products with 1 to 4 tokens by decoding every group: 16-bit codes, and the deterministic choice.

y[n] = scale[n] * sum over groups j, codebooks m of <codebook[m][code[n, j, m]], x group j>.
A thread takes one row and reads its codes 16 bytes at a time; every code fetches a codeword of
GROUP values, which neighbouring threads do at random places. With 16-bit codes that table is 1 MiB
and lives in the L2 cache, whose 32-byte sectors limit the kernel (the loads bypass L1, which would
only evict what it holds). All arithmetic is float32 and all sums have one order, so results are
the same in every run; the other kernels are tested against this one on a GPU.
"""

import triton
import triton.language as tl

from pvrt_kernels.gpu.lut_gemv import UNSPECIALISED
from pvrt_kernels.gpu.split_k import finish, load_rest, row_tile


@triton.jit
def add_products(
    sums,
    table,
    entry,
    x_ptr,
    group,
    groups,
    tokens,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """sums[t] [ROWS, WIDTH] plus the products of codewords entry [ROWS] with group `group` of x."""
    WIDTH: tl.constexpr = GROUP if GROUP < 8 else 8
    e = tl.arange(0, WIDTH)[None, :]
    inside = group + tl.zeros((1, WIDTH), dtype=tl.int32)
    for part_of_group in tl.static_range(GROUP // WIDTH):
        here = part_of_group * WIDTH
        at = table + entry[:, None] * GROUP + here
        if SIZE <= 256:
            w = tl.load(at, eviction_policy="evict_last")
        else:
            w = tl.load(at, cache_modifier=".cg")
        added = ()
        for t in tl.static_range(TOKENS):
            x = tl.load(
                x_ptr + (t * groups + inside) * GROUP + here + e,
                mask=inside < tl.where(t < tokens, groups, 0),
                other=0.0,
                eviction_policy="evict_last",
            )
            product = w.to(tl.float32) * x.to(tl.float32)
            added = added + (sums[t] + product,)  # noqa: RUF005 (Triton has no *added)
        sums = added
    return sums


@triton.jit(do_not_specialize=UNSPECIALISED)
def direct_gemv(
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
    """Grid (row tiles, split); program (i, s) sums blocks s, s + split, ... of ROWS rows.

    As `lut_gemv`, but words is [blocks, rows, 2] int64, SIZE up to 65536 and GROUP a power of two;
    partial is [split, tokens, rows].
    """
    part, row, end = row_tile(tl.program_id(0), rows, end0, end1, PARTS, ROWS)
    BITS: tl.constexpr = 8 if SIZE <= 256 else 16
    CODES: tl.constexpr = 64 // BITS  # in a word
    n = row + tl.arange(0, ROWS)
    WIDTH: tl.constexpr = GROUP if GROUP < 8 else 8  # of a load: 16 bytes of a 16-bit type
    e = tl.arange(0, WIDTH)[None, :]
    at = words_ptr + n.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
    stride = rows.to(tl.int64) * 2
    first = tl.program_id(1)
    count = tl.cdiv(groups * CODEBOOKS, 2 * CODES)
    table = codebooks_ptr + part * ((CODEBOOKS + REST) * SIZE * GROUP) + e
    words = tl.load(
        at + first * stride, mask=(n < end)[:, None], other=0, eviction_policy="evict_first"
    )
    sums = (tl.zeros((ROWS, WIDTH), dtype=tl.float32),) * TOKENS
    for b in range(first, count, split):
        ahead = tl.load(
            at + (b + split) * stride,
            mask=(n < tl.where(b + split < count, end, 0))[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        halves = tl.split(words)
        for i in tl.static_range(2 * CODES):
            f = b * (2 * CODES) + i
            code = (halves[i // CODES] >> (i % CODES * BITS)).to(tl.int32) & (SIZE - 1)
            entry = (f % CODEBOOKS) * SIZE + code
            sums = add_products(
                sums, table, entry, x_ptr, f // CODEBOOKS, groups, tokens, TOKENS, SIZE, GROUP
            )
        if REST > 0:
            rest = load_rest(rest_ptr, b, n, n < end, rows, CODEBOOKS, REST)
            rest_words = tl.split(rest) if REST * 2 == CODEBOOKS else (tl.reshape(rest, (ROWS,)),)
            for i in tl.static_range(2 * CODES * REST // CODEBOOKS):
                f = b * (2 * CODES * REST // CODEBOOKS) + i
                code = (rest_words[i // (CODES // 2)] >> (i % (CODES // 2) * BITS)) & (SIZE - 1)
                entry = (CODEBOOKS + f % REST) * SIZE + code
                sums = add_products(
                    sums, table, entry, x_ptr, f // REST, groups, tokens, TOKENS, SIZE, GROUP
                )
        words = ahead
    totals = ()
    for t in tl.static_range(TOKENS):
        totals = totals + (tl.sum(sums[t], axis=1),)  # noqa: RUF005
    finish(
        totals,
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
        TOKENS,
        HAS_BIAS,
        True,
    )
