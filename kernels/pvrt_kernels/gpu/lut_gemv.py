"""Products of 8-bit codes with one token by table lookup; plain Triton.

y[n] = scale[n] * sum over the code bytes f of row n of  <codebook[f % M][code], x group[f // M]>.
Every inner product of a codeword is computed once for all rows of a tile: each of the 16 bytes of a
block gets a table of 256 sums, and a row costs 16 lookups and 16 additions per block, no decoding
and no multiplication. `tl.gather` along a flat axis keeps the table in shared memory and reads it
with LDS.32. (Along an axis short enough for one warp Triton makes thousands of shuffles of it: the
axis must stay flat.) The table is made by multiplications in registers, since threads that hold
neighbouring codewords store it without bank conflicts; lookups do meet in banks.

This kernel takes what `csrc/lut_gemv.cu` does not: other numbers of codebooks, groups of 4, and
machines without NVRTC.
"""

import triton
import triton.language as tl

from pvrt_kernels.gpu.split_k import finish, load_rest, row_tile

UNSPECIALISED = ["rows", "groups", "tokens", "end0", "end1", "split"]


@triton.jit
def table_for_one(
    codebooks,
    x_ptr,
    first,
    groups,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Products of codebooks [V, GROUP] with groups first ... of x, as a flat [GROUPS * V]."""
    e = tl.arange(0, GROUP)
    columns = ()
    for j in tl.static_range(GROUPS):
        group = first + j + tl.zeros((GROUP,), dtype=tl.int32)  # of one value: masks whole loads
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
def load_codebooks(ptr, e, CODEBOOKS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """[CODEBOOKS * 256, GROUP] codewords, zeros beyond SIZE; e is 0 to GROUP."""
    v = tl.arange(0, CODEBOOKS * 256)
    return tl.load(
        ptr + (v // 256 * SIZE + v % 256)[:, None] * GROUP + e[None, :],
        mask=(v % 256 < SIZE)[:, None],
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

    x [1, groups * GROUP], tokens and TOKENS 1; words [blocks, rows, 4] int32, 16
    bytes per row and block; rest as in `load_rest`; codebooks [PARTS, CODEBOOKS + REST, SIZE,
    GROUP], CODEBOOKS in (1, 2, 4), SIZE <= 256; scales and bias [rows]; y [tokens, rows]; partial
    and arrived as in `finish`.
    """
    part, row, end = row_tile(tl.program_id(0), rows, end0, end1, PARTS, ROWS)
    GROUPS: tl.constexpr = 16 // CODEBOOKS  # groups in a block
    n = row + tl.arange(0, ROWS)
    e = tl.arange(0, GROUP)
    own_codebooks = codebooks_ptr + part * ((CODEBOOKS + REST) * SIZE * GROUP)
    codebooks = load_codebooks(own_codebooks, e, CODEBOOKS, SIZE, GROUP)
    if REST > 0:
        more_codebooks = load_codebooks(
            own_codebooks + CODEBOOKS * SIZE * GROUP, e, REST, SIZE, GROUP
        )
    at = words_ptr + n.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    stride = rows.to(tl.int64) * 4
    first = tl.program_id(1)
    count = tl.cdiv(groups * CODEBOOKS, 16)
    codes = tl.load(
        at + first * stride, mask=(n < end)[:, None], other=0, eviction_policy="evict_first"
    )
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for b in range(first, count, split):
        ahead = tl.load(
            at + (b + split) * stride,
            mask=(n < tl.where(b + split < count, end, 0))[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        table = table_for_one(codebooks, x_ptr, b * GROUPS, groups, GROUPS, GROUP)
        total += tl.sum(look_up(table, table_index(codes, 4), ROWS), axis=1)
        if REST > 0:
            more = load_rest(rest_ptr, b, n, n < end, rows, CODEBOOKS, REST)
            table = table_for_one(more_codebooks, x_ptr, b * GROUPS, groups, GROUPS, GROUP)
            index = table_index(more, 4 * REST // CODEBOOKS)
            total += tl.sum(look_up(table, index, ROWS), axis=1)
        codes = ahead
    finish(
        (total,),
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
