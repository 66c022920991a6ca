"""Adam (arXiv 1412.6980) with a learning rate for every tensor, all of them moved at once.

torch's own takes one rate for a group of tensors, and moves group after group: with hundreds of
tensors, each with a rate of its own, a GPU would wait for Python most of the time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-8


class Adam:
    """Moves `tensors` by their gradients; `rates` are their learning rates.

    Moments are there from the beginning, so that a resumed run can fill them. A tensor without a
    gradient stays as it is, and its own count of steps too.
    """

    def __init__(
        self, tensors: Sequence[Tensor], rates: Sequence[float], betas: tuple[float, float]
    ) -> None:
        self.tensors, self.rates, self.betas = list(tensors), list(rates), betas
        self.averages = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.squares = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.counts = [0] * len(self.tensors)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step with all rates times `factor`; gradients are then forgotten."""
        given = {i: tensor.grad for i, tensor in enumerate(self.tensors) if tensor.grad is not None}
        if not given:
            return
        moved, grads = list(given), list(given.values())
        for i in moved:
            self.counts[i] += 1
        tensors = [self.tensors[i] for i in moved]
        averages, squares = [self.averages[i] for i in moved], [self.squares[i] for i in moved]
        first, second = self.betas
        lengths = [-self.rates[i] * factor / (1 - first ** self.counts[i]) for i in moved]
        torch._foreach_lerp_(averages, grads, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - second ** self.counts[i]) ** 0.5 for i in moved])
        torch._foreach_add_(roots, _EPSILON)
        torch._foreach_addcdiv_(tensors, averages, roots, lengths)
        for tensor in tensors:
            tensor.grad = None
