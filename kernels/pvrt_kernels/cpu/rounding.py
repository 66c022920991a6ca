"""How far the CPU kernels may be from exact products: bounds that tests and users can rely on.

The bounds are for inputs in fp32. A result of 16 bits is rounded to its type besides. Where many
tokens may be rounded to bfloat16 (`products.may_round`), inputs and decoded weights are too.

All sums are fp32: an operation rounds by at most 2^-24 of its result. One kernel rounds more.
avx512-vbmi looks up to five tokens up in tables of 16-bit steps. Tables go in blocks of 16 (or all
codebooks of one group, where there are more). A block has one step, the span of its widest table
over 65535 but at least 2^-126, and each lookup is off by at most half a step. Tokens whose tables
would overflow, and six tokens and more, use fp32 tables.
"""

import math

import torch
from torch import Tensor

from pvrt_kernels import reference
from pvrt_kernels.cpu import library
from pvrt_kernels.reference import code_rows

_FP32_ROUNDING = 2.0**-24
_SMALLEST = 2.0**-149  # of fp32
_SMALLEST_STEP = 2.0**-126  # of tables, as in avx512.c
_BLOCK_TABLES = 16  # block_groups of cpu.h
# What fp32 sums of a layer's length lose on random data, as a part of the result's norm.
FP32_RELATIVE = 2e-6
# A block's widest table spans at most this many times the root mean square of its codewords:
# 5 to 7 for normal codewords, and inputs of one group that are three times as large as the others.
_SPAN = 20


def relative_error() -> float:
    """A product's error norm over its norm, for ordinary inputs, on the instruction set in use.

    2e-6 with fp32 tables and 9e-5 with those of avx512-vbmi: roundings of half a step are
    1 / sqrt(3) of it in the root mean square, and the norms of errors and results grow alike with
    the number of lookups. Where terms cancel or outliers meet small values, `product_bound` holds.
    """
    return FP32_RELATIVE + _SPAN / math.sqrt(3) * library.table_rounding()


def product_bound(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    partition_sizes: list[int],
) -> Tensor:
    """The largest error of each output of a packed product, whatever the data; float64 [n, out].

    x [n, in] float32; the rest as in `pvrt_kernels.aqlm_linear` with codes of up to 8 bits,
    codebooks [P, M, 2^B, 1, g]. Holds for every number of tokens, however small inputs are, and
    wherever nothing overflows.
    """
    books, group = codebooks.shape[1], codebooks.shape[4]
    block_groups = max(1, _BLOCK_TABLES // books)
    lookups = codes.shape[1] * books
    inputs = x.double().reshape(len(x), -1, group)
    # Every term passes the sum of its table's value, all later sums, the scale and the bias.
    passes = group + lookups + 3
    sizes = codebooks.double().abs(), torch.ones_like(scales, dtype=torch.float64)
    bound = inputs.abs().flatten(1) @ reference.dequantize(codes, *sizes, partition_sizes).T
    bound *= passes * _FP32_ROUNDING
    bound += lookups * (group + 3) * _SMALLEST  # what underflows
    # A table's value is rounded to a step. Its way there, and the sum of the block's minima that is
    # added back, pass fp32 values as large as the widest table.
    block_tables = max(books, _BLOCK_TABLES)
    rounding = library.table_rounding()
    if rounding:
        per_span = rounding + (block_tables + 5) * _FP32_ROUNDING
        for rows, part in zip(code_rows(partition_sizes, 1), codebooks[:, :, :, 0], strict=True):
            tables = torch.einsum("njg,mvg->njmv", inputs, part.double())
            spans = (tables.amax(-1) - tables.amin(-1)).amax(-1)  # [n, groups]
            for block in torch.split(spans, block_groups, 1):
                widest = block.amax(1, keepdim=True)
                bound[:, rows] += block.shape[1] * books * (per_span * widest + _SMALLEST_STEP)
    bound = bound * scales.double().reshape(-1).abs() + _SMALLEST
    return bound if bias is None else bound + 2 * _FP32_ROUNDING * bias.double().abs()
