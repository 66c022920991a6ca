"""Products in which every row has a weight of its own: the experts of a mixture.

All weights of a group have one shape and scheme. Each is laid out as a single layer is
(`packed.py`), and the results are stacked along a new first dimension, so that any packed kernel
can take one of them as a view. `pvrt::aqlm_grouped_linear` is functional, and the choice of how to
walk the weights happens inside of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt_kernels.dispatch import registry
from pvrt_kernels.ops import aqlm_dequantize, aqlm_linear
from pvrt_kernels.packed import aqlm_pack

# Names of the layouts beside those of packed kernels.
_DENSE, _PLAIN = "dense", "plain"
# Copying the packed weight of a row moves it about three times; reading all E of them once, E.
_COPY_COST = 3


class Dense(NamedTuple):
    """Decoded weights [E, out, in], for want of a kernel."""

    weight: Tensor


class Plain(NamedTuple):
    """The checkpoint's own layout, stacked: see `aqlm_pack_group`."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor


@dataclass(frozen=True)
class GroupedWeight:
    """E weights [sum(partition_sizes), in_features], stacked in the layout of one kernel.

    `tensors` is the NamedTuple of that layout, each tensor with a new first dimension of E.
    """

    kernel: str
    tensors: tuple[Tensor, ...]
    partition_sizes: list[int]

    @property
    def decoded(self) -> bool:
        """Whether these are dense weights, for want of a kernel."""
        return self.kernel == _DENSE


def aqlm_pack_group(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    partition_sizes: list[int],
) -> GroupedWeight:
    """Lay E weights out for the kernel of their device, one after the other.

    codes [E, rows/out_group, in/g, M], codebooks [E, P, M, 2^B, out_group, g] and scales
    [E, rows/out_group, 1, 1, 1]; `dtype` is that of the activations to come. Where the device has
    no kernel, a CPU gets decoded weights and others keep the layout that they came in.
    """
    as_given = GroupedWeight(_PLAIN, Plain(codes, codebooks, scales), partition_sizes)
    stacked: list[Tensor] = []
    for index in range(codes.shape[0]):
        one = codes[index], codebooks[index], scales[index]
        packed = aqlm_pack(*one, dtype, partition_sizes)
        if packed is not None:
            tensors, kernel = packed.tensors, packed.kernel
            if index == 0:
                packed.warm_up(dtype, False)
        elif codes.device.type == "cpu":
            tensors, kernel = Dense(aqlm_dequantize(*one, partition_sizes).to(dtype)), _DENSE
        else:
            return as_given
        if not stacked:
            stacked = [t.new_empty(codes.shape[0], *t.shape) for t in tensors]
        for target, tensor in zip(stacked, tensors, strict=True):
            target[index].copy_(tensor)
    if not stacked:  # a rank that holds no expert
        return as_given
    return GroupedWeight(kernel, _layout_of(kernel)(*stacked), partition_sizes)


def aqlm_grouped_linear(x: Tensor, index: Tensor, weight: GroupedWeight) -> Tensor:
    """y[n] = W[index[n]] x[n]; zero where index[n] is negative.

    x [N, in] floating, index [N] integers -> [N, out] in the dtype of x.
    """
    y: Tensor = torch.ops.pvrt.aqlm_grouped_linear(
        x, index, list(weight.tensors), weight.partition_sizes, weight.kernel
    )
    return y


def _layout_of(kernel: str) -> Callable[..., tuple[Tensor, ...]]:
    own = {_DENSE: Dense, _PLAIN: Plain}
    return own[kernel] if kernel in own else registry.packed(kernel).layout


def _linear_of(kernel: str, sizes: list[int]) -> Callable[[Tensor, list[Tensor]], Tensor]:
    """The product of x with one weight, of which the op has the tensors in order."""
    if kernel == _DENSE:
        return lambda x, one: F.linear(x, one[0])
    if kernel == _PLAIN:
        return lambda x, one: aqlm_linear(x, one[0], one[1], one[2], None, sizes)
    packed = registry.packed(kernel)
    return lambda x, one: packed.linear(x, packed.layout(*one), None, sizes)


def _grouped(
    x: Tensor, index: Tensor, tensors: list[Tensor], partition_sizes: list[int], kernel: str
) -> Tensor:
    linear = _linear_of(kernel, partition_sizes)
    y = x.new_zeros(x.shape[0], sum(partition_sizes))
    if not x.shape[0]:
        return y
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return _without_host(x, index, tensors, y, linear)
    for expert in sorted({expert for expert in index.tolist() if expert >= 0}):
        rows = (index == expert).nonzero().flatten()
        y[rows] = linear(x[rows], [tensor[expert] for tensor in tensors])
    return y


def _without_host(
    x: Tensor,
    index: Tensor,
    tensors: list[Tensor],
    y: Tensor,
    linear: Callable[[Tensor, list[Tensor]], Tensor],
) -> Tensor:
    """The same where the host must not look at `index`: while a CUDA graph is captured."""
    experts, inside = tensors[0].shape[0], (index >= 0)[:, None]
    if _COPY_COST * x.shape[0] < experts:
        wanted = index.clamp(min=0).long()
        parts = [
            linear(x[n : n + 1], [t.index_select(0, wanted[n : n + 1])[0] for t in tensors])
            for n in range(x.shape[0])
        ]
        return torch.where(inside, torch.cat(parts), y)
    for expert in range(experts):
        one = linear(x, [tensor[expert] for tensor in tensors])
        y = torch.where((index == expert)[:, None], one, y)
    return y


def _fake(
    x: Tensor, index: Tensor, tensors: list[Tensor], partition_sizes: list[int], kernel: str
) -> Tensor:
    return x.new_empty(x.shape[0], sum(partition_sizes))


_library: Any = torch.library.Library("pvrt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "aqlm_grouped_linear"
    "(Tensor x, Tensor index, Tensor[] packed, SymInt[] partition_sizes, str kernel) -> Tensor"
)
_library.impl("aqlm_grouped_linear", _grouped, "CompositeExplicitAutograd")
torch.library.register_fake("pvrt::aqlm_grouped_linear", _fake, lib=_library)
