"""The torch.library ops `pvrt::aqlm_linear`, `aqlm_dequantize` and `aqlm_parameter_grads`.

Functional, no host sync, fresh outputs; fake implementations for torch.compile and meta tensors;
autograd with respect to x, codebooks, scales and bias. The choice of kernel happens inside the op,
because a Python branch on the number of tokens outside would be frozen by torch.compile.
"""

from typing import Any

import torch
from torch import Tensor

from pvrt_kernels import reference
from pvrt_kernels.cpu import products, pv_step
from pvrt_kernels.dispatch import Problem, registry
from pvrt_kernels.packed import check_rows


@torch.library.custom_op("pvrt::aqlm_dequantize", mutates_args=())
def _dequantize_op(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> Tensor:
    decode = products.dequantize if products.can_decode(codes, codebooks) else reference.dequantize
    return decode(codes, codebooks, scales, partition_sizes)


@_dequantize_op.register_fake
def _(codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]) -> Tensor:
    _check(codes, codebooks, scales, partition_sizes)
    _, _, _, out_group, g = codebooks.shape
    return codebooks.new_empty(codes.shape[0] * out_group, codes.shape[1] * g)


@torch.library.custom_op("pvrt::aqlm_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    partition_sizes: list[int],
) -> Tensor:
    _, num_codebooks, size, out_group, g = codebooks.shape
    problem = Problem(
        device_type=x.device.type,
        dtype=x.dtype,
        num_codebooks=num_codebooks,
        codebook_size=size,
        out_group_size=out_group,
        in_group_size=g,
        tokens=x.numel() // x.shape[-1],
    )
    y = registry.select(problem).linear(x, codes, codebooks, scales, bias, partition_sizes)
    # Autograd forbids to add in place to a view of a tensor that only the kernel knows.
    fresh: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return fresh


@_linear_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    partition_sizes: list[int],
) -> Tensor:
    _check(codes, codebooks, scales, partition_sizes)
    return x.new_empty(*x.shape[:-1], codes.shape[0] * codebooks.shape[3])


def _check(codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]) -> None:
    """Shape errors of a caller, found while tracing or in the public wrappers."""
    if codebooks.dim() != 5 or codes.dim() != 3:
        raise ValueError(
            f"codes must be 3-D and codebooks 5-D, got {tuple(codes.shape)} and "
            f"{tuple(codebooks.shape)}"
        )
    parts, num_codebooks, _, out_group, _ = codebooks.shape
    if codes.shape[2] != num_codebooks:
        raise ValueError(f"codes index {codes.shape[2]} codebooks, there are {num_codebooks}")
    if parts != len(partition_sizes):
        raise ValueError(f"{parts} codebook sets for {len(partition_sizes)} partitions")
    if any(size % out_group for size in partition_sizes):
        raise ValueError(f"partition sizes {partition_sizes} do not divide by {out_group}")
    rows = sum(partition_sizes) // out_group
    if codes.shape[0] != rows or scales.numel() != rows:
        raise ValueError(
            f"codes have {codes.shape[0]} rows and scales {scales.numel()}, "
            f"the partitions need {rows}"
        )


@torch.library.custom_op("pvrt::aqlm_parameter_grads", mutates_args=())
def _parameter_grads_op(
    grad_weight: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    partition_sizes: list[int],
) -> tuple[Tensor, Tensor]:
    """dL/dW [out, in] -> (dL/dcodebooks, dL/dscales); W is linear in each of the two."""
    book_grads, scale_grads = [], []
    for part, rows in enumerate(reference.code_rows(partition_sizes, codebooks.shape[3])):
        outputs = slice(rows.start * codebooks.shape[3], rows.stop * codebooks.shape[3])
        given = grad_weight[outputs], codes[rows], codebooks[part], scales[rows]
        own = pv_step.parameter_gradients if pv_step.can_gather(*given[:3]) else _part_grads
        books, part_scales = own(*given)
        book_grads.append(books)
        scale_grads.append(part_scales)
    grad_scales = torch.cat(scale_grads).reshape(scales.shape).to(scales.dtype)
    return torch.stack(book_grads).to(codebooks.dtype), grad_scales


def _part_grads(
    grad_weight: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of one partition, by torch: codebooks [M, K, out_group, g]."""
    num_codebooks, size, out_group, g = codebooks.shape
    blocks = reference.to_blocks(grad_weight.float(), out_group, g)
    index = reference.entry_indices(codes, size)
    scale_grads = (blocks * reference.decode_unscaled(codes, codebooks)).sum(dim=(1, 2))
    flat = (blocks * scales.float().reshape(-1, 1, 1)).reshape(-1, out_group * g)
    empty = flat.new_zeros(size, out_group * g)
    per_book = [empty.index_add(0, index[..., m].reshape(-1), flat) for m in range(num_codebooks)]
    return torch.stack(per_book).reshape(codebooks.shape), scale_grads.view(scales.shape)


@_parameter_grads_op.register_fake
def _(
    grad_weight: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    partition_sizes: list[int],
) -> tuple[Tensor, Tensor]:
    _check(codes, codebooks, scales, partition_sizes)
    return torch.empty_like(codebooks), torch.empty_like(scales)


def _dequantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, codebooks, scales, ctx.partition_sizes = inputs
    ctx.save_for_backward(codes, codebooks, scales)


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebooks, scales = ctx.saved_tensors
    books, row_scales = _parameter_grads_op(grad, codes, codebooks, scales, ctx.partition_sizes)
    return None, books, row_scales, None


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codebooks, scales, bias, ctx.partition_sizes = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, codes, codebooks, scales)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebooks, scales = ctx.saved_tensors
    needs_x, _, needs_books, needs_scales, needs_bias, _ = ctx.needs_input_grad
    flat = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_books = grad_scales = grad_bias = None
    if needs_x:
        weight = _dequantize_op(codes, codebooks, scales, ctx.partition_sizes)
        grad_x = (flat @ weight.to(grad.dtype)).reshape(x.shape).to(x.dtype)
    if needs_books or needs_scales:
        grad_weight = flat.T @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
        grad_books, grad_scales = _parameter_grads_op(
            grad_weight, codes, codebooks, scales, ctx.partition_sizes
        )
    if needs_bias:
        grad_bias = flat.float().sum(0).to(ctx.bias_dtype)
    return (
        grad_x,
        None,
        grad_books if needs_books else None,
        grad_scales if needs_scales else None,
        grad_bias,
        None,
    )


_dequantize_op.register_autograd(_dequantize_backward, setup_context=_dequantize_setup)
_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def aqlm_dequantize(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int] | None = None
) -> Tensor:
    """Decode a quantised weight to [out, in] in the dtype of `codebooks`.

    codes [out/out_group, in/g, M] int8 or int16 (value v stands for v mod 2^B);
    codebooks [M, 2^B, out_group, g], or [P, M, 2^B, out_group, g] with `partition_sizes` (output
    rows per partition) for a fused layer; scales [out/out_group, 1, 1, 1].
    Raises ValueError when the shapes contradict each other.
    """
    codebooks, sizes = _partitioned(codes, codebooks, partition_sizes)
    _check(codes, codebooks, scales, sizes)
    weight: Tensor = _dequantize_op(codes, codebooks, scales, sizes)
    return weight


def aqlm_parameter_grads(
    grad_weight: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Chain rule through `aqlm_dequantize`: dL/dW [out, in] -> dL/dcodebooks and dL/dscales.

    For training loops that hold dL/dW anyway: nothing is decoded into a graph. Shapes as in
    `aqlm_dequantize`; the gradients have the shapes and dtypes of codebooks and scales.
    """
    sets, sizes = _partitioned(codes, codebooks, None)
    _check(codes, sets, scales, sizes)
    book_grads, scale_grads = _parameter_grads_op(grad_weight, codes, sets, scales, sizes)
    return book_grads[0], scale_grads


def aqlm_linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    partition_sizes: list[int] | None = None,
) -> Tensor:
    """y = x W^T + bias with W given by codes, codebooks and scales (see `aqlm_dequantize`).

    x [..., in] floating -> [..., out] in the dtype of x. Raises ValueError on wrong shapes.
    """
    codebooks, sizes = _partitioned(codes, codebooks, partition_sizes)
    _check(codes, codebooks, scales, sizes)
    in_features = codes.shape[1] * codebooks.shape[4]
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {in_features}")
    y: Tensor = _linear_op(x, codes, codebooks, scales, bias, sizes)
    return y


def aqlm_embedding(ids: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """Rows `ids` of the weight that codes, codebooks and scales make (see `aqlm_dequantize`).

    ids [...] integers -> [..., in] in the dtype of `codebooks`. Only these rows are decoded, and
    gradients reach codebooks and scales. Raises ValueError when the shapes contradict each other,
    IndexError for a row that is not there (on a GPU torch's index_select asserts).
    """
    sets, sizes = _partitioned(codes, codebooks, None)
    _check(codes, sets, scales, sizes)
    flat, out_group = ids.reshape(-1).long(), codebooks.shape[2]
    if not torch.compiler.is_compiling():
        check_rows(flat, sizes[0])
    at = flat // out_group
    rows = aqlm_dequantize(codes.index_select(0, at), codebooks, scales.index_select(0, at))
    if out_group > 1:
        member = (flat % out_group).view(-1, 1, 1)
        rows = rows.view(-1, out_group, rows.shape[-1]).take_along_dim(member, 1)
    return rows.reshape(*ids.shape, rows.shape[-1])


def _partitioned(
    codes: Tensor, codebooks: Tensor, partition_sizes: list[int] | None
) -> tuple[Tensor, list[int]]:
    if partition_sizes is not None:
        return codebooks, partition_sizes
    if codebooks.dim() != 4:
        raise ValueError("codebooks of several partitions need partition_sizes")
    return codebooks.unsqueeze(0), [codes.shape[0] * codebooks.shape[2]]
