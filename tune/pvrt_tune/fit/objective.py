"""The objective of every fit of one linear layer: the error of its outputs on calibration inputs.

tr(E H E^T) with E = W minus its quantised version, H = mean of x x^T (arXiv 2401.06118, eq. 4).
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class Objective:
    """W [out, in] and H [in, in], both float32, and what every fit computes from them."""

    def __init__(self, weight: Tensor, second_moment: Tensor) -> None:
        self.weight, self.moment = weight.detach().float(), second_moment.float()
        power = float(torch.einsum("oi,oi->", self.weight @ self.moment, self.weight))
        self.power = max(power, torch.finfo(torch.float32).tiny)

    def relative_error(self, quantised: Tensor) -> float:
        """tr(E H E^T) / tr(W H W^T)."""
        error = self.weight - quantised
        return float(torch.einsum("oi,oi->", error @ self.moment, error)) / self.power

    def feedback(self, damping: float, order: Tensor | None = None) -> Tensor:
        """Upper factor U of H^-1 = U^T U, inputs in the given order, for carrying errors forward.

        With inputs chosen one after the other, the loss of an error e of input i is e^2 / U_ii^2
        if all later inputs make the best of it, by taking e / U_ii * U[i, later] off their targets
        (GPTQ, arXiv 2210.17323). damping: share of mean(diag H) added to the diagonal.
        """
        # Each takes the place of the one before: those of wide layers are gigabytes.
        factor = self.moment.clone() if order is None else self.moment[order][:, order]
        factor.diagonal().add_(damping * factor.diagonal().mean() + 1e-12)
        factor = torch.linalg.cholesky(factor)
        factor = torch.cholesky_inverse(factor)
        upper: Tensor = torch.linalg.cholesky(factor, upper=True)
        return upper


def feedback_bytes(in_features: int, device: str) -> int:
    """Peak of `Objective.feedback` on "cpu" or a GPU: matrices of H's size."""
    # A factor and the inverse; on GPUs a copy of the factor, and cuSOLVER's workspace was nearly a
    # fourth one for 11,008 inputs on an H100, where torch's counts left 0.9 of one unexplained.
    return (2 if device == "cpu" else 4) * 4 * in_features**2


def column_blocks(in_features: int, unit: int, wanted: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of about `wanted` columns, each a multiple of `unit` wide."""
    width = max(unit, wanted // unit * unit)
    for start in range(0, in_features, width):
        yield start, min(start + width, in_features)
