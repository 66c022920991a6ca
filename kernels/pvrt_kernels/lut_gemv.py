"""Products of 8-bit codes with 1 to 4 tokens by table lookup; plain Triton.

y[n] = scale[n] * sum over the code bytes f of row n of  <codebook[f % M][code], x group[f // M]>.
Every inner product with a codeword is computed once for all rows of a tile: each of the 16 bytes
of a block gets a table of 256 sums (one small tensor-core product), and a row costs 16 lookups and
16 additions per block, no decoding and no multiplication. `tl.gather` along a flat axis keeps the
table in shared memory and reads it with LDS.32. (Along an axis short enough for one warp Triton
makes thousands of shuffles of it: the axis must stay flat.)

One token has a table of float32. Of 2 or 4 tokens each lookup serves two, with both sums as
float16 in one word: LDS.32 is what limits the kernel. The sums are first divided by a bound
(largest |x| of the block times largest 1-norm of a codeword), so that none can overflow.
"""

import triton
import triton.language as tl

from pvrt_kernels.split import finish, row_tile

UNSPECIALISED = ["rows", "groups", "tokens", "end0", "end1", "split"]


@triton.jit
def unpack_half(words, shift: tl.constexpr):
    """The float16 at bit `shift` of int32 words, as float32."""
    return (words >> shift).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack_half(values):
    """float32 values in [-1, 1] -> float16 in the low bits of int32 words."""
    return values.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit(do_not_specialize=UNSPECIALISED)
def lut_gemv(
    x_ptr,
    words_ptr,
    books_ptr,
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
    BOOKS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (row tiles, split); program (i, s) sums blocks s, s + split, ... of ROWS rows.

    x [tokens, groups * GROUP] with tokens <= TOKENS in (1, 2, 4); words [blocks, rows, 4] int32, 16
    bytes per row and block; books [PARTS, BOOKS, SIZE, GROUP], BOOKS in (1, 2, 4), SIZE <= 256;
    scales and bias [rows]; y [tokens, rows]; partial and arrived as in `finish`.
    """
    part, row, end = row_tile(tl.program_id(0), rows, end0, end1, PARTS, ROWS)
    GROUPS: tl.constexpr = 16 // BOOKS  # groups in a block
    COLUMNS: tl.constexpr = GROUPS if GROUPS > 8 else 8  # the least that tl.dot takes
    DEPTH: tl.constexpr = GROUP if GROUP > 16 else 16  # likewise
    ENTRIES: tl.constexpr = COLUMNS * BOOKS * 256
    n = row + tl.arange(0, ROWS)
    e = tl.arange(0, DEPTH)
    v = tl.arange(0, BOOKS * 256)
    books = tl.load(
        books_ptr
        + part * (BOOKS * SIZE * GROUP)
        + (v // 256 * SIZE + v % 256)[:, None] * GROUP
        + e[None, :],
        mask=(v % 256 < SIZE)[:, None] & (e < GROUP)[None, :],
        other=0.0,
    )
    if TOKENS > 1:
        norm = tl.max(tl.sum(tl.abs(books.to(tl.float32)), axis=1), axis=0)
    group = tl.arange(0, COLUMNS)
    inside = (e < GROUP)[:, None] & (group < GROUPS)[None, :]
    word = tl.arange(0, 4)[None, :]
    offset = word * 1024
    at = words_ptr + n.to(tl.int64)[:, None] * 4 + word
    stride = rows.to(tl.int64) * 4
    first = tl.program_id(1)
    count = tl.cdiv(groups * BOOKS, 16)
    codes = tl.load(
        at + first * stride, mask=(n < end)[:, None], other=0, eviction_policy="evict_first"
    )
    sums = (tl.zeros((ROWS,), dtype=tl.float32),) * TOKENS
    for b in range(first, count, split):
        ahead = tl.load(
            at + (b + split) * stride,
            mask=(n < tl.where(b + split < count, end, 0))[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        even = tl.join((codes & 255) + offset, ((codes >> 16) & 255) + (offset + 512))
        odd = tl.join(((codes >> 8) & 255) + (offset + 256), ((codes >> 24) & 255) + (offset + 768))
        index = tl.reshape(tl.join(even, odd), (ROWS * 16,))
        j = (b * GROUPS + group)[None, :]
        k = j * GROUP + e[:, None]
        added = ()
        if TOKENS == 1:
            x = tl.load(
                x_ptr + k, mask=inside & (j < groups), other=0.0, eviction_policy="evict_last"
            )
            table = tl.reshape(tl.trans(tl.dot(books, x)), (ENTRIES,))
            found = tl.reshape(tl.gather(table, index, 0), (ROWS, 16))
            added = (sums[0] + tl.sum(found, axis=1),)
        else:
            for pair in tl.static_range(TOKENS // 2):
                here = x_ptr + 2 * pair * groups * GROUP + k
                x0 = tl.load(
                    here,
                    mask=inside & (j < tl.where(2 * pair < tokens, groups, 0)),
                    other=0.0,
                    eviction_policy="evict_last",
                )
                x1 = tl.load(
                    here + groups * GROUP,
                    mask=inside & (j < tl.where(2 * pair + 1 < tokens, groups, 0)),
                    other=0.0,
                    eviction_policy="evict_last",
                )
                bound0 = tl.max(tl.max(tl.abs(x0.to(tl.float32)), axis=1), axis=0) * norm + 1e-30
                bound1 = tl.max(tl.max(tl.abs(x1.to(tl.float32)), axis=1), axis=0) * norm + 1e-30
                both = pack_half(tl.dot(books, x0) * (1 / bound0))
                both |= pack_half(tl.dot(books, x1) * (1 / bound1)) << 16
                table = tl.reshape(tl.trans(both), (ENTRIES,))
                found = tl.reshape(tl.gather(table, index, 0), (ROWS, 16))
                sum0 = tl.sum(unpack_half(found, 0), axis=1)
                sum1 = tl.sum(unpack_half(found, 16), axis=1)
                sum0 = sums[2 * pair] + sum0 * bound0
                sum1 = sums[2 * pair + 1] + sum1 * bound1
                added = added + (sum0, sum1)  # noqa: RUF005 (Triton has no *added)
        sums = added
        codes = ahead
    finish(
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
        TOKENS,
        HAS_BIAS,
        False,
    )
