"""Weights in a kernel's own layout: packed once at load, multiplied by `pvrt::aqlm_packed_linear`.

Training and checkpoints keep codes, codebooks and scales; a model that only runs calls `aqlm_pack`
for each layer and drops them. `pvrt::aqlm_packed_rows` decodes single rows of the same layout, so
that an embedding and the lm_head tied to it are kept once. The ops are functional and make fresh
outputs; their gradient is that of x alone (codebooks and scales train in the checkpoint's layout).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvrt_kernels import reference
from pvrt_kernels.dispatch import Problem, registry


@dataclass(frozen=True)
class PackedWeight:
    """A weight [sum(partition_sizes), in_features] in the layout of one kernel, on its device.

    `tensors` is the kernel's NamedTuple.
    """

    kernel: str
    tensors: tuple[Tensor, ...]
    partition_sizes: list[int]
    in_features: int

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, codebooks, scales) that were given to `aqlm_pack`, codebooks with P.

        Codes come in the shortest type that holds them.
        """
        return registry.packed(self.kernel).unpack(self.tensors, self.in_features)

    def dequantize(self) -> Tensor:
        """The weight [out, in] in the dtype of the codebooks."""
        kernel = registry.packed(self.kernel)
        if kernel.dequantize is not None:
            return kernel.dequantize(self.tensors, self.partition_sizes, self.in_features)
        return reference.dequantize(*self.unpack(), self.partition_sizes)

    def warm_up(self, dtype: torch.dtype, has_bias: bool) -> None:
        """Compile now what products with x of a dtype need; before CUDA graphs are captured."""
        kernel = registry.packed(self.kernel)
        if kernel.warm_up is not None:
            args = (self.tensors, self.partition_sizes, self.in_features)
            kernel.warm_up(*args, dtype, has_bias)


def aqlm_pack(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    partition_sizes: list[int] | None = None,
) -> PackedWeight | None:
    """Lay a weight out for the kernel of its device; None where no kernel wants that.

    Arguments as in `aqlm_linear`; `dtype` is that of the activations to come. The result does not
    alias `codes`: drop them, and a model packed layer by layer never holds its codes twice.
    """
    if partition_sizes is None:
        codebooks, partition_sizes = codebooks.unsqueeze(0), [codes.shape[0] * codebooks.shape[2]]
    _, num_codebooks, size, out_group, g = codebooks.shape
    kernel = registry.select_packed(
        Problem(codes.device.type, dtype, num_codebooks, size, out_group, g, 1)
    )
    if kernel is None:
        return None
    with torch.no_grad():
        tensors = kernel.pack(codes, codebooks, scales, partition_sizes)
    return PackedWeight(kernel.name, tensors, partition_sizes, codes.shape[1] * g)


def aqlm_packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x [..., in] floating -> [..., out] in the dtype of x.

    Raises ValueError when x does not have as many features as the weight takes.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.in_features}")
    y: Tensor = torch.ops.pvrt.aqlm_packed_linear(
        x, list(weight.tensors), bias, weight.partition_sizes, weight.kernel
    )
    return y


def aqlm_packed_rows(weight: PackedWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a weight by their numbers, as an embedding reads them: decoded, rounded once.

    rows [...] integers -> [..., in] of a floating dtype. Raises IndexError for a row that is not
    there, and on a GPU, which cannot raise without waiting, returns NaN for it. The first call of a
    scheme and dtype compiles on a GPU: make one before a CUDA graph is captured.
    """
    y: Tensor = torch.ops.pvrt.aqlm_packed_rows(
        rows, list(weight.tensors), weight.partition_sizes, weight.in_features, dtype, weight.kernel
    )
    return y


def check_rows(rows: Tensor, count: int) -> None:
    """Raise IndexError if a number on the CPU is not one of `count` rows."""
    if rows.device.type == "cpu" and not bool(((rows >= 0) & (rows < count)).all()):
        wrong = next(row for row in rows.flatten().tolist() if not 0 <= row < count)
        raise IndexError(f"there is no row {wrong}: the weight has rows 0 to {count - 1}")


def _linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, partition_sizes: list[int], kernel: str
) -> Tensor:
    chosen = registry.packed(kernel)
    return chosen.linear(x, chosen.layout(*packed), bias, partition_sizes)


def _linear_fake(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, partition_sizes: list[int], kernel: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(partition_sizes))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, ctx.partition_sizes, ctx.kernel = inputs
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.packed = packed  # not differentiated, so they need no save_for_backward


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs_x, _, needs_bias, _, _ = ctx.needs_input_grad
    grad_x = grad_bias = None
    if needs_x:
        tensors = registry.packed(ctx.kernel).layout(*ctx.packed)
        weight = PackedWeight(ctx.kernel, tensors, ctx.partition_sizes, ctx.in_features)
        grad_x = grad @ weight.dequantize().to(grad.dtype)
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype)
    return grad_x, [None] * len(ctx.packed), grad_bias, None, None


def _rows(
    rows: Tensor,
    packed: list[Tensor],
    partition_sizes: list[int],
    in_features: int,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    check_rows(rows, sum(partition_sizes))
    chosen, flat = registry.packed(kernel), rows.reshape(-1).long()
    tensors = chosen.layout(*packed)
    if chosen.rows is None:
        weight = PackedWeight(kernel, tensors, partition_sizes, in_features).dequantize()
        y = weight.index_select(0, flat).to(dtype)
    else:
        y = chosen.rows(tensors, flat, partition_sizes, in_features, dtype)
    return y.reshape(*rows.shape, in_features)


def _rows_fake(
    rows: Tensor,
    packed: list[Tensor],
    partition_sizes: list[int],
    in_features: int,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    return rows.new_empty(*rows.shape, in_features, dtype=dtype)


# Library.define and impl instead of custom_op: the latter's Python costs more than a small layer.
_library: Any = torch.library.Library("pvrt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "aqlm_packed_linear"
    "(Tensor x, Tensor[] packed, Tensor? bias, SymInt[] partition_sizes, str kernel) -> Tensor"
)
_library.impl("aqlm_packed_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("pvrt::aqlm_packed_linear", _linear_fake, lib=_library)
torch.library.register_autograd(
    "pvrt::aqlm_packed_linear", _linear_backward, setup_context=_linear_setup, lib=_library
)
_library.define(
    "aqlm_packed_rows(Tensor rows, Tensor[] packed, SymInt[] partition_sizes, SymInt in_features, "
    "ScalarType dtype, str kernel) -> Tensor"
)
_library.impl("aqlm_packed_rows", _rows, "CompositeExplicitAutograd")
torch.library.register_fake("pvrt::aqlm_packed_rows", _rows_fake, lib=_library)
