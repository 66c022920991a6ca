"""`lut_gemv` for one token in Gluon, where shared memory is ours to place (Triton 3.7.1 and newer).

The table of a block stays in shared memory for any number of rows, so that its construction (here
by 8 multiplications per entry, with conflict-free stores) is shared by more rows than registers
could hold at a time. Triton's interpreter does not run Gluon: tests run this source on the
interpreter through a stand-in for the few names of `gl` that it uses.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pvrt_kernels.gpu.lut_gemv import UNSPECIALISED
from pvrt_kernels.gpu.split_k import row_tile


@gluon.jit(do_not_specialize=UNSPECIALISED)
def lut_gluon(
    x_ptr,
    words_ptr,
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
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """As `lut_gemv` with TOKENS = 1; ROWS a multiple of 4 rows per thread."""
    WARPS: gl.constexpr = gl.num_warps()
    PER_THREAD: gl.constexpr = ROWS // (WARPS * 32)
    GROUPS: gl.constexpr = 16 // CODEBOOKS
    part, row, end = row_tile(gl.program_id(0), rows, end0, end1, PARTS, ROWS)
    # A thread holds whole codewords, and the table entries that come of them.
    entries: gl.constexpr = gl.BlockedLayout([1, GROUP], [32, 1], [WARPS, 1], [1, 0])
    v = gl.arange(0, CODEBOOKS * 256, layout=gl.SliceLayout(1, entries))
    e = gl.arange(0, GROUP, layout=gl.SliceLayout(0, entries))
    at = (v // 256 * SIZE + v % 256)[:, None] * GROUP + e[None, :]
    codebooks_at = codebooks_ptr + part * (CODEBOOKS * SIZE * GROUP) + at
    codebooks = gl.load(
        codebooks_at, mask=(v % 256 < SIZE)[:, None] & (e < GROUP)[None, :], other=0.0
    )
    codebooks = codebooks.to(gl.float32)
    table = gl.allocate_shared_memory(
        gl.float32, [16 * 256], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    # And 16 bytes of each of its rows, as 4 words.
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    i = gl.arange(0, WARPS * 128, layout=flat)
    offset = i % 4 * 1024
    n = row + gl.arange(0, WARPS * 32, layout=gl.SliceLayout(1, pairs))
    first = gl.program_id(1)
    count = gl.cdiv(groups * CODEBOOKS, 16)
    stride = rows.to(gl.int64) * 4
    sums = (gl.zeros([WARPS * 32], gl.float32, layout=gl.SliceLayout(1, pairs)),) * PER_THREAD
    for b in range(first, count, split):
        words = ()
        for r in gl.static_range(PER_THREAD):  # asked for before the table is built
            start = row + r * (WARPS * 32)
            here = words_ptr + b * stride + start.to(gl.int64) * 4 + i
            word = gl.load(here, mask=start + i // 4 < end, other=0, eviction_policy="evict_first")
            words = words + (word,)  # noqa: RUF005 (Triton has no *words)
        if b != first:
            gl.barrier()
        for j in gl.static_range(GROUPS):
            group = b * GROUPS + j
            x = gl.load(x_ptr + group * GROUP + e, mask=group + e * 0 < groups, other=0.0)
            entry = gl.sum(codebooks * x.to(gl.float32)[None, :], axis=1)
            table.slice(j * CODEBOOKS * 256, CODEBOOKS * 256).store(entry)
        gl.barrier()
        added = ()
        for r in gl.static_range(PER_THREAD):
            word = words[r]
            found = table.gather((word & 255) + offset, 0)
            found += table.gather(((word >> 8) & 255) + (offset + 256), 0)
            found += table.gather(((word >> 16) & 255) + (offset + 512), 0)
            found += table.gather(((word >> 24) & 255) + (offset + 768), 0)
            four = gl.convert_layout(gl.reshape(found, [WARPS * 32, 4]), pairs)
            added = added + (sums[r] + gl.sum(four, axis=1),)  # noqa: RUF005
        sums = added
    last = True
    if split > 1:  # as in split_k.finish
        for r in gl.static_range(PER_THREAD):
            here = n + r * (WARPS * 32)
            gl.atomic_add(partial_ptr + here, sums[r], mask=here < end, sem="relaxed")
        gl.barrier()
        last = gl.atomic_add(arrived_ptr + gl.program_id(0), 1, sem="acq_rel") == split - 1
    if last:
        for r in gl.static_range(PER_THREAD):
            here = n + r * (WARPS * 32)
            mask = here < end
            total = sums[r]
            if split > 1:
                total = gl.load(partial_ptr + here, mask=mask, other=0.0, cache_modifier=".cg")
                gl.store(partial_ptr + here, gl.zeros_like(total), mask=mask)
            y = total * gl.load(scales_ptr + here, mask=mask, other=0.0).to(gl.float32)
            if HAS_BIAS:
                y += gl.load(bias_ptr + here, mask=mask, other=0.0).to(gl.float32)
            gl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask=mask)
        if split > 1:
            gl.store(arrived_ptr + gl.program_id(0), 0)
