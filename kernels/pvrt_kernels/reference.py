"""The definition of AQLM decoding in plain torch. Every kernel is tested against this file.

Notation (arXiv 2401.06118, section 3): M codebooks of 2^B codewords; every codeword is a block of
out_group x g weights; a block of weights is the sum of one of each codebook, times its row's scale.

A fused layer (q, k and v in one call) stacks the rows of several source layers. Each source layer
keeps its own codebooks, so `codebooks` has a leading partition dimension P and `partition_sizes`
says how many output rows belong to each.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def entry_indices(codes: Tensor, codebook_size: int) -> Tensor:
    """Codes as stored (two's-complement wrap of an unsigned index) -> int64 indices, same shape.

    A stored value v means v mod 2^B: int8 -1 is codeword 255 of a codebook of 256.
    """
    return codes.to(torch.int64) & (codebook_size - 1)


def code_rows(partition_sizes: list[int], out_group: int) -> list[slice]:
    """Rows of `codes` that belong to each partition."""
    ends = [0]
    for size in partition_sizes:
        ends.append(ends[-1] + size // out_group)
    return [slice(a, b) for a, b in pairwise(ends)]


def decode_unscaled(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum of the codewords of one partition, before scaling.

    codes [out/out_group, in/g, M] integer; codebooks [M, 2^B, out_group, g].
    Returns [out/out_group, in/g, out_group * g] in float32.
    """
    num_codebooks, size, out_group, g = codebooks.shape
    index = entry_indices(codes, size)
    codewords = codebooks.float().reshape(num_codebooks, size, out_group * g)
    total = F.embedding(index[..., 0], codewords[0])
    for m in range(1, num_codebooks):
        total += F.embedding(index[..., m], codewords[m])
    return total


def to_matrix(blocks: Tensor, out_group: int) -> Tensor:
    """[out/out_group, in/g, out_group * g] blocks -> [out, in] matrix."""
    rows, groups, width = blocks.shape
    g = width // out_group
    blocks = blocks.reshape(rows, groups, out_group, g)
    return blocks.transpose(1, 2).reshape(rows * out_group, groups * g)


def to_blocks(matrix: Tensor, out_group: int, g: int) -> Tensor:
    """[out, in] matrix -> [out/out_group, in/g, out_group * g] blocks; inverse of `to_matrix`."""
    out, in_features = matrix.shape
    blocks = matrix.reshape(out // out_group, out_group, in_features // g, g)
    return blocks.transpose(1, 2).reshape(out // out_group, in_features // g, out_group * g)


def dequantize(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> Tensor:
    """Decode the whole weight.

    codes [out/out_group, in/g, M] integer; codebooks [P, M, 2^B, out_group, g] floating;
    scales [out/out_group, 1, 1, 1] floating. Returns [out, in] in the dtype of `codebooks`;
    sums and scaling are done in float32 and rounded once.
    """
    out_group = codebooks.shape[3]
    parts = []
    for part, rows in enumerate(code_rows(partition_sizes, out_group)):
        blocks = decode_unscaled(codes[rows], codebooks[part])
        parts.append(to_matrix(blocks * scales[rows].float().reshape(-1, 1, 1), out_group))
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    return weight.to(codebooks.dtype)


def linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    partition_sizes: list[int],
) -> Tensor:
    """y = x W^T + bias with W = dequantize(...), in the dtype of x. x [..., in] -> [..., out]."""
    weight = dequantize(codes, codebooks, scales, partition_sizes).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
