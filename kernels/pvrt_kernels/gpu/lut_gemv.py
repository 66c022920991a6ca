"""Products of 8-bit codes with 1 to 4 tokens by table lookup; plain Triton.

y[n] = scale[n] * sum over the code bytes f of row n of  <codebook[f % M][code], x group[f // M]>.
Every inner product with a codeword is computed once for all rows of a tile: each of the 16 bytes
of a block gets a table of 256 sums, and a row costs 16 lookups and 16 additions per block, no
decoding and no multiplication. `tl.gather` along a flat axis keeps the table in shared memory and
reads it with LDS.32. (Along an axis short enough for one warp Triton makes thousands of shuffles of
it: the axis must stay flat.)

One token has a table of float32, made by multiplications in registers, since threads that hold
neighbouring codewords store it without bank conflicts. Of 2 or 4 tokens each lookup serves two,
with both sums as float16 in one word: lookups are what limits the kernel. Their tables are small
products on tensor cores; sums are first divided by a bound (largest |x| of the block times largest
1-norm of a codeword), so that none can overflow.
"""

import triton
import triton.language as tl

from pvrt_kernels.gpu.split_k import finish, load_rest, row_tile

UNSPECIALISED = ["rows", "groups", "tokens", "end0", "end1", "split"]


@triton.jit
def unpack_half(words, shift: tl.constexpr):
    """The float16 at bit `shift` of int32 words, as float32."""
    return (words >> shift).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack_half(values):
    """float32 values in [-1, 1] -> float16 in the low bits of int32 words."""
    return values.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def table_for_one(
    codebooks,
    x_ptr,
    first,
    groups,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Products of codebooks [V, DEPTH] with groups first ... of x, as a flat [GROUPS * V]."""
    e = tl.arange(0, DEPTH)
    columns = ()
    for j in tl.static_range(GROUPS):
        group = first + j + tl.zeros((DEPTH,), dtype=tl.int32)  # of one value: masks whole loads
        x = tl.load(
            x_ptr + group * GROUP + e, mask=group < groups, other=0.0, eviction_policy="evict_last"
        )
        entry = tl.sum(codebooks.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
        columns = columns + (entry,)  # noqa: RUF005 (Triton has no *columns)
    # Joined by the highest bit of j first, the new axes are those of j in order.
    HALVINGS: tl.constexpr = 2 if GROUPS == 4 else (3 if GROUPS == 8 else 4)
    for step in tl.static_range(HALVINGS):
        joined = ()
        for j in tl.static_range(GROUPS >> (step + 1)):
            pair = tl.join(columns[j], columns[j + (GROUPS >> (step + 1))])
            joined = joined + (pair,)  # noqa: RUF005
        columns = joined
    table = tl.reshape(columns[0], (codebooks.shape[0], GROUPS))
    return tl.reshape(tl.trans(table), (GROUPS * codebooks.shape[0],))


@triton.jit
def table_for_two(codebooks, x0, x1, bound0, bound1):
    """Products of codebooks [V, DEPTH] with x0 and x1 [DEPTH, COLUMNS] over their bounds.

    Flat [COLUMNS * V]: two float16 in a word.
    """
    both = pack_half(tl.dot(codebooks, x0) * (1 / bound0))
    both |= pack_half(tl.dot(codebooks, x1) * (1 / bound1)) << 16
    return tl.reshape(tl.trans(both), (both.shape[0] * both.shape[1],))


@triton.jit
def load_codebooks(ptr, e, CODEBOOKS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """[CODEBOOKS * 256, DEPTH] codewords, zeros beyond SIZE and GROUP; e is 0 to DEPTH."""
    v = tl.arange(0, CODEBOOKS * 256)
    return tl.load(
        ptr + (v // 256 * SIZE + v % 256)[:, None] * GROUP + e[None, :],
        mask=(v % 256 < SIZE)[:, None] & (e < GROUP)[None, :],
        other=0.0,
    )


@triton.jit
def table_index(words, WORDS: tl.constexpr):
    """Bytes of words [rows, WORDS] -> flat [rows * WORDS * 4]: byte i in the i-th table of 256."""
    offset = tl.arange(0, WORDS)[None, :] * 1024
    even = tl.join((words & 255) + offset, ((words >> 16) & 255) + (offset + 512))
    odd = tl.join(((words >> 8) & 255) + (offset + 256), ((words >> 24) & 255) + (offset + 768))
    return tl.reshape(tl.join(even, odd), (words.shape[0] * WORDS * 4,))


@triton.jit
def look_up(table, index, ROWS: tl.constexpr):
    """Values [ROWS, lookups of a row] of a flat table."""
    return tl.reshape(tl.gather(table, index, 0), (ROWS, index.shape[0] // ROWS))


@triton.jit(do_not_specialize=UNSPECIALISED)
def lut_gemv(
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

    x [tokens, groups * GROUP] with tokens <= TOKENS in (1, 2, 4); words [blocks, rows, 4] int32, 16
    bytes per row and block; rest as in `load_rest`; codebooks [PARTS, CODEBOOKS + REST, SIZE,
    GROUP], CODEBOOKS in (1, 2, 4), SIZE <= 256; scales and bias [rows]; y [tokens, rows]; partial
    and arrived as in `finish`.
    """
    part, row, end = row_tile(tl.program_id(0), rows, end0, end1, PARTS, ROWS)
    GROUPS: tl.constexpr = 16 // CODEBOOKS  # groups in a block
    # The least that tl.dot takes are 8 columns and a depth of 16.
    COLUMNS: tl.constexpr = GROUPS if GROUPS > 8 else 8
    DEPTH: tl.constexpr = GROUP if (GROUP > 16 or TOKENS == 1) else 16
    n = row + tl.arange(0, ROWS)
    e = tl.arange(0, DEPTH)
    own_codebooks = codebooks_ptr + part * ((CODEBOOKS + REST) * SIZE * GROUP)
    codebooks = load_codebooks(own_codebooks, e, CODEBOOKS, SIZE, GROUP)
    if REST > 0:
        more_codebooks = load_codebooks(
            own_codebooks + CODEBOOKS * SIZE * GROUP, e, REST, SIZE, GROUP
        )
    if TOKENS > 1:
        norm = tl.max(tl.sum(tl.abs(codebooks.to(tl.float32)), axis=1), axis=0)
        if REST > 0:
            more_norm = tl.max(tl.sum(tl.abs(more_codebooks.to(tl.float32)), axis=1), axis=0)
            norm = tl.maximum(norm, more_norm)
    group = tl.arange(0, COLUMNS)
    inside = (e < GROUP)[:, None] & (group < GROUPS)[None, :]
    at = words_ptr + n.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    stride = rows.to(tl.int64) * 4
    first = tl.program_id(1)
    count = tl.cdiv(groups * CODEBOOKS, 16)
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
        index = table_index(codes, 4)
        if REST > 0:
            more_index = table_index(
                load_rest(rest_ptr, b, n, n < end, rows, CODEBOOKS, REST), 4 * REST // CODEBOOKS
            )
        added = ()
        if TOKENS == 1:
            table = table_for_one(codebooks, x_ptr, b * GROUPS, groups, GROUPS, GROUP, DEPTH)
            sum0 = sums[0] + tl.sum(look_up(table, index, ROWS), axis=1)
            if REST > 0:
                table = table_for_one(
                    more_codebooks, x_ptr, b * GROUPS, groups, GROUPS, GROUP, DEPTH
                )
                sum0 += tl.sum(look_up(table, more_index, ROWS), axis=1)
            added = (sum0,)
        else:
            j = (b * GROUPS + group)[None, :]
            k = j * GROUP + e[:, None]
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
                found = look_up(table_for_two(codebooks, x0, x1, bound0, bound1), index, ROWS)
                sum0 = tl.sum(unpack_half(found, 0), axis=1)
                sum1 = tl.sum(unpack_half(found, 16), axis=1)
                if REST > 0:
                    table = table_for_two(more_codebooks, x0, x1, bound0, bound1)
                    found = look_up(table, more_index, ROWS)
                    sum0 += tl.sum(unpack_half(found, 0), axis=1)
                    sum1 += tl.sum(unpack_half(found, 16), axis=1)
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
