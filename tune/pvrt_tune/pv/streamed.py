"""Weights of a student that its device never holds: decoded when a layer computes, then dropped.

Their gradients go to host memory as they come. All products are those of a linear layer with a
weight on the device, in the same order of operations, so that results are the same bit by bit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrt_tune.pv.host_memory import HostMemory
from pvrt_tune.pv.representation import Representation


class StreamedWeight:
    """A weight [rows, in] in codes alone, decoded to the type `compute`, and its gradient.

    What an optimizer asks of a parameter: its shape, and `grad` on the device, which None clears.
    """

    def __init__(
        self, representation: Representation, compute: torch.dtype, host: HostMemory
    ) -> None:
        self._representation, self._compute, self.host = representation, compute, host
        decoded = self.decode()
        self.shape, self.device = decoded.shape, decoded.device
        self._sum = host.empty(tuple(self.shape), compute)
        self._has_grad = False

    def decode(self) -> Tensor:
        """The weight as it is now."""
        return self._representation.decode().to(self._compute)

    def add_grad(self, grad: Tensor) -> None:
        """Add a gradient [rows, in] on the device; sums are in the type of the weight."""
        before = self.grad
        self._sum.copy_(grad if before is None else before.add_(grad))
        self._has_grad = True

    @property
    def grad(self) -> Tensor | None:
        """Sum of the gradients so far, on the device."""
        if not self._has_grad:
            return None
        return self._sum.to(self.device, copy=True)

    @grad.setter
    def grad(self, value: None) -> None:
        self._has_grad = False


class StreamedLinear(nn.Module):
    """y = x W^T + bias with a streamed weight."""

    def __init__(self, weight: StreamedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.streamed = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        # Has autograd ask for the weight's gradient, whatever else needs one.
        self._asks = torch.zeros((), device=weight.device).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the weight's type."""
        y: Tensor = _Product.apply(x, self.bias, self._asks, self.streamed)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    """A product with a weight that is decoded once in each direction."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, asks: Tensor, streamed: StreamedWeight
    ) -> Tensor:
        weight = streamed.decode()
        flat = x.to(weight.dtype).reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat)
        ctx.streamed, ctx.shape, ctx.dtype = streamed, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = F.linear(flat, weight, None if bias is None else bias.to(weight.dtype))
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.mm(ctx.streamed.decode()).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        ctx.streamed.add_grad(grad.t().mm(x))
        return grad_x, grad_bias, None, None
