"""One linear layer on a scalar grid, W ~ s (q - z): s and z for every row and group of inputs.

The objective is that of additive codebooks, tr(E H E^T), and so are the stages:

    ranges       the scale and zero of least error, every input weighted by the part of the loss
                 that later inputs cannot make up for
    assignment   one input after the other, high-variance channels first; the error is carried into
                 the later ones (GPTQ, arXiv 2210.17323)
    sweeps       on the exact objective: scales in closed form, codes one input at a time

Shapes: W [out, in], H [in, in], codes q [out, in], scales s and zeros z [out, in/G].
Everything is float32; nothing is random.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvrt.format.scheme import GridScheme
from pvrt_tune.fit.objective import Objective, column_blocks, feedback_bytes
from pvrt_tune.settings import FitSettings

# Ranges tried between the smallest and largest weight of a group and this share of them.
_NARROWEST, _RANGES, _REFINEMENTS = 0.4, 24, 3
_SMALLEST_SCALE = 1e-8


class GridLinear(nn.Module):
    """y = x W^T + bias with W = scales * (codes - zeros), a scale and a zero per group of inputs.

    Parameters: codes [out, in] uint8 and zeros [out, in/G] uint8 (None: symmetric, 2^(bits-1)
    everywhere), never trained; scales [out, in/G]; bias [out] or None.
    Raises ValueError when the scheme's groups do not divide the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: GridScheme,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not scheme.divides(out_features, in_features):
            raise ValueError(
                f"scheme {scheme} does not divide a linear layer of {out_features} x {in_features}"
            )
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        shape = scheme.scales_shape(out_features, in_features)
        codes = torch.zeros(out_features, in_features, dtype=torch.uint8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.zeros: nn.Parameter | None = None
        if not scheme.symmetric:
            zeros = torch.zeros(shape, dtype=torch.uint8)
            self.zeros = nn.Parameter(zeros, requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype))

    @property
    def packed_bytes(self) -> int:
        """Bytes of the layer's tensors in a checkpoint (`pvrt.format.grid`)."""
        shape = self.out_features, self.in_features
        words = math.prod(self.scheme.packed_shape(*shape))
        if self.zeros is not None:
            words += math.prod(self.scheme.packed_zeros_shape(*shape))
        floats = self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)
        return 4 * words + floats + 16  # two int64 say the shape

    def dequantize(self) -> Tensor:
        """The weight [out, in] in the dtype of the scales; differentiable in them."""
        middle = (self.scheme.levels + 1) // 2
        zeros = middle if self.zeros is None else self.zeros.unsqueeze(2).to(torch.int16)
        groups = self.codes.view(*self.scales.shape, self.scheme.group_size)
        steps = (groups.to(torch.int16) - zeros).to(self.scales.dtype)
        return (self.scales.unsqueeze(2) * steps).view(self.codes.shape)

    @property
    def weight(self) -> Tensor:
        """The whole weight, decoded anew: some models read it without a call."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return F.linear(x, self.dequantize(), self.bias)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )


@dataclass(frozen=True)
class GridLayerFit:
    """codes and zeros (None: symmetric) uint8, scales in the storage type, and the relative error
    tr(EHE^T) / tr(WHW^T)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    relative_error: float


class GridFit:
    """State of one layer's fit; the steps are methods so that they can be measured one by one."""

    def __init__(
        self, weight: Tensor, second_moment: Tensor, scheme: GridScheme, settings: FitSettings
    ) -> None:
        out, in_features = weight.shape
        if not scheme.divides(out, in_features):
            raise ValueError(f"cannot fit scheme {scheme} to a {out} x {in_features} layer")
        self.scheme, self.settings = scheme, settings
        self.size, self.levels = scheme.group_size, scheme.levels
        self.objective = Objective(weight, second_moment)
        self.weight, self.moment = self.objective.weight, self.objective.moment
        # High-variance channels first: those to come must be able to make up for their errors.
        self._order = self.moment.diagonal().argsort(descending=True, stable=True)
        self._feedback = self.objective.feedback(settings.damping, self._order)
        self.scales = self.weight.new_ones(scheme.scales_shape(out, in_features))
        self.zeros = torch.full_like(self.scales, (self.levels + 1) // 2)
        self.codes = torch.zeros_like(self.weight)

    # ---- quantities ----

    def quantised(self) -> Tensor:
        """The weight that codes, scales and zeros stand for, [out, in]."""
        return self._spread(self.scales) * (self.codes - self._spread(self.zeros))

    def relative_error(self) -> float:
        """tr(E H E^T) / tr(W H W^T)."""
        return self.objective.relative_error(self.quantised())

    def _spread(self, groups: Tensor) -> Tensor:
        """A value per group [out, in/G] for every input, [out, in]."""
        return groups.repeat_interleave(self.size, 1)

    # ---- ranges ----

    def start(self) -> None:
        """Scales and zeros of least weighted error, and codes rounded to the nearest."""
        grouped = (*self.scales.shape, self.size)
        weight = self.weight.view(grouped)
        importance = torch.empty_like(self.moment[0])
        importance[self._order] = self._feedback.diagonal().pow(-2)
        importance = importance.view(1, *grouped[1:])
        if self.scheme.symmetric:
            low = -weight.abs().amax(2)
            widest = -2 * low / self.levels
        else:
            low = weight.amin(2).clamp_max(0)
            widest = (weight.amax(2).clamp_min(0) - low) / self.levels
        widest = widest.clamp_min(_SMALLEST_SCALE)

        def steps(scales: Tensor, zeros: Tensor) -> Tensor:
            codes = weight / scales.unsqueeze(2) + zeros.unsqueeze(2)
            return codes.round_().clamp_(0, self.levels).sub_(zeros.unsqueeze(2))

        best = torch.full_like(widest, torch.inf)

        def offer(scales: Tensor, zeros: Tensor) -> None:
            nonlocal best
            error = steps(scales, zeros).mul_(scales.unsqueeze(2)).sub_(weight).square_()
            loss = error.mul_(importance).sum(2)
            better = loss < best
            best = torch.where(better, loss, best)
            self.scales = torch.where(better, scales, self.scales)
            self.zeros = torch.where(better, zeros, self.zeros)

        for share in torch.linspace(1, _NARROWEST, _RANGES).tolist():
            zeros = self.zeros
            if not self.scheme.symmetric:
                zeros = (-low / widest).round().clamp(0, self.levels)
            offer(share * widest, zeros)
        shifts = (0,) if self.scheme.symmetric else (0, 1, -1)
        for _ in range(_REFINEMENTS):
            scales, middle = self.scales, self.zeros
            for shift in shifts:
                zeros = (middle + shift).clamp(0, self.levels)
                taken = steps(scales, zeros)
                norm = (taken.square() * importance).sum(2)
                fitted = (taken * weight * importance).sum(2) / norm.clamp_min(1e-30)
                offer(torch.where(fitted > _SMALLEST_SCALE, fitted, scales), zeros)
        self.codes = self._round(self.weight, self._spread(self.scales), self._spread(self.zeros))

    def _round(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return (weight / scales + zeros).round_().clamp_(0, self.levels)

    # ---- codes ----

    def assign_with_feedback(self) -> None:
        """Choose all codes input by input, carrying each input's error into the later ones."""
        upper, order = self._feedback, self._order
        target = self.weight[:, order].T.contiguous()  # inputs first: rows are contiguous
        codes = torch.empty_like(target)
        scales, zeros = self.scales.T.contiguous(), self.zeros.T.contiguous()
        groups = (order // self.size).tolist()
        for start, stop in column_blocks(len(order), 1, self.settings.column_block):
            errors = torch.empty(stop - start, target.shape[1], device=target.device)
            for i in range(start, stop):
                scale, zero = scales[groups[i]], zeros[groups[i]]
                codes[i] = self._round(target[i], scale, zero)
                error = (target[i] - scale * (codes[i] - zero)) / upper[i, i]
                errors[i - start] = error
                target[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
            target[stop:] -= upper[start:stop, stop:].T @ errors
        self.codes[:, order] = codes.T

    def sweep(self, fit_scales: bool = True) -> None:
        """One pass over all groups: the scale, every code, and the scale again, given the rest."""
        product = self.moment @ (self.weight - self.quantised()).T  # H E^T, kept exact
        for start, stop in column_blocks(len(self.moment), self.size, self.settings.column_block):
            inside = slice(start, stop)
            changes = torch.zeros(stop - start, product.shape[1], device=product.device)
            for first in range(start, stop, self.size):
                local = slice(first - start, first - start + self.size)
                changes[local] = self._sweep_group(first // self.size, product, fit_scales)
                # The group's own rows are up to date already.
                moment = self.moment[inside, first : first + self.size]
                rest = moment @ changes[local]
                rest[local] = 0
                product[inside] -= rest
            outside = self.moment[:, inside] @ changes
            outside[inside] = 0
            product -= outside

    def _sweep_group(self, group: int, product: Tensor, fit_scales: bool) -> Tensor:
        """Renew one group and its rows of H E^T. Returns its change, [G, out]."""
        inputs = slice(group * self.size, (group + 1) * self.size)
        moment, rows = self.moment[inputs, inputs], product[inputs]
        zeros, scales = self.zeros[:, group], self.scales[:, group].clone()
        codes = self.codes[:, inputs].T.contiguous()
        before = scales * (codes - zeros)
        if fit_scales:
            scales = self._fit_scale(scales, codes - zeros, moment, rows)
        curvature = moment.diagonal().clamp_min(1e-30)
        for i in range(self.size):
            code = (codes[i] + rows[i] / (scales * curvature[i])).round_().clamp_(0, self.levels)
            rows.addr_(moment[i], scales * (code - codes[i]), alpha=-1)
            codes[i] = code
        if fit_scales:
            scales = self._fit_scale(scales, codes - zeros, moment, rows)
        self.scales[:, group] = scales
        self.codes[:, inputs] = codes.T
        return scales * (codes - zeros) - before

    def _fit_scale(self, scales: Tensor, steps: Tensor, moment: Tensor, rows: Tensor) -> Tensor:
        """The best scale of a group for codes - zeros [G, out]; brings rows [G, out] up to date."""
        image = moment @ steps
        norm = (image * steps).sum(0)
        change = (rows * steps).sum(0) / norm.clamp_min(1e-30)
        change = torch.where((norm > 0) & (scales + change > _SMALLEST_SCALE), change, 0)
        rows -= change * image
        return scales + change

    def result(self, dtype: torch.dtype) -> GridLayerFit:
        """Round the scales to the storage type and let the codes settle on them."""
        self.scales = self.scales.to(dtype).float().clamp_min(torch.finfo(dtype).tiny)
        self.sweep(fit_scales=False)
        return GridLayerFit(
            self.codes.to(torch.uint8),
            self.scales.to(dtype),
            None if self.scheme.symmetric else self.zeros.to(torch.uint8),
            self.relative_error(),
        )


def peak_bytes(shape: tuple[int, int], scheme: GridScheme, device: str) -> int:
    """Peak of one layer's fit [out, in] beyond its weight and moment in float32."""
    out, in_features = shape
    weight, moment = 4 * out * in_features, 4 * in_features**2
    # Of the ranges: scales and zeros (present, tried, and bounds of both), and losses.
    groups = 20 * weight // scheme.group_size
    # The factors of H. Later one of them is kept, with the codes, and rounding takes scales, zeros
    # and steps of every weight.
    return groups + max(feedback_bytes(in_features, device), moment + 6 * weight)


def fit_grid(
    weight: Tensor, second_moment: Tensor, scheme: GridScheme, settings: FitSettings
) -> GridFit:
    """Quantise one weight [out, in] given H [in, in]; `result` rounds it to what is stored.

    Of the settings `rounds`, `damping` and `column_block` matter. Raises ValueError when the scheme
    does not divide the layer.
    """
    fit = GridFit(weight, second_moment, scheme, settings)
    fit.start()
    fit.assign_with_feedback()
    for _ in range(settings.rounds):
        fit.sweep()
    return fit
