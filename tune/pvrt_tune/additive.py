"""One linear layer in additive codebooks, fitted in the metric of its inputs.

Minimises tr(E H E^T) with E = W - s * sum_m C_m[b_m] and H = mean of x x^T over calibration tokens
(arXiv 2401.06118, section 3; H is the layer's input second moment):

    start        k-means on rows / scale, weighted by diag(H), one codebook after the other
    assignment   group by group with the error carried into later groups (as GPTQ does, here with
                 whole groups: the metric is the Schur complement of the groups still to come)
    rounds of    codebooks by conjugate gradients and scales in closed form (both are linear given
                 the codes), then a sweep over all codes on the exact objective

Shapes: W [out, in], H [in, in], codes [out, groups, M], codebooks C [M, K, g], scales s [out, 1].
Everything is float32; a run is deterministic for one seed, machine and thread count.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.checkpoint import QuantizedLayer
from pvrt.scheme import Scheme


@dataclass(frozen=True)
class FitSettings:
    """Effort of one layer's fit.

    rounds: alternations of fit and sweep. damping: share of mean(diag H) added to the diagonal for
    the assignment's inverse only; the objective itself is never damped. column_block: input
    features whose products with H are updated at once.
    """

    rounds: int = 10
    kmeans_iterations: int = 24
    kmeans_momentum: float = 0.8
    cg_iterations: int = 8
    damping: float = 0.01
    column_block: int = 128


@dataclass(frozen=True)
class LayerFit:
    """A fitted layer in checkpoint layout and its relative error tr(EHE^T) / tr(WHW^T)."""

    layer: QuantizedLayer
    relative_error: float


class AdditiveFit:
    """State of one layer's fit; the steps are methods so that they can be measured one by one."""

    def __init__(
        self,
        weight: Tensor,
        second_moment: Tensor,
        scheme: Scheme,
        settings: FitSettings,
        generator: torch.Generator,
    ) -> None:
        out, in_features = weight.shape
        if scheme.out_group_size != 1 or not scheme.divides(out, in_features):
            raise ValueError(f"cannot fit scheme {scheme} to a {out} x {in_features} layer")
        self.g, self.size = scheme.in_group_size, scheme.codebook_size
        self.groups = in_features // self.g
        self.scheme, self.settings, self.generator = scheme, settings, generator
        self.weight, self.moment = weight.float(), second_moment.float()
        energy = float(torch.einsum("oi,oi->", self.weight @ self.moment, self.weight))
        self.energy = max(energy, torch.finfo(torch.float32).tiny)
        # A row of zeros still needs a scale to divide by.
        self.scales = self.weight.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-8)
        self.codebooks = weight.new_zeros(scheme.num_codebooks, self.size, self.g).float()
        self.codes = torch.zeros(
            out, self.groups, scheme.num_codebooks, dtype=torch.int64, device=weight.device
        )

    # ---- quantities ----

    def unscaled(self, codebooks: Tensor | None = None) -> Tensor:
        """Sum of the chosen entries, [out, in]."""
        books = self.codebooks if codebooks is None else codebooks
        total = F.embedding(self.codes[..., 0], books[0])
        for m in range(1, len(books)):
            total = total + F.embedding(self.codes[..., m], books[m])
        return total.reshape(self.weight.shape)

    def residual(self) -> Tensor:
        """W minus its quantised version, [out, in]."""
        return self.weight - self.scales * self.unscaled()

    def relative_error(self) -> float:
        """tr(E H E^T) / tr(W H W^T)."""
        error = self.residual()
        return float(torch.einsum("oi,oi->", error @ self.moment, error)) / self.energy

    # ---- start ----

    def start(self) -> None:
        """Residual k-means on the scaled rows, each coordinate weighted by its diag(H)."""
        points = (self.weight / self.scales).reshape(-1, self.g)
        importance = self.moment.diagonal().clamp_min(0).reshape(1, self.groups, self.g)
        importance = importance + 1e-6 * importance.mean()
        weights = (importance * self.scales.square().unsqueeze(-1)).reshape(-1, self.g)
        flat_codes = self.codes.view(-1, len(self.codebooks))
        for m in range(len(self.codebooks)):
            self.codebooks[m], flat_codes[:, m] = self._kmeans(points, weights)
            points = points - self.codebooks[m][flat_codes[:, m]]

    def _kmeans(self, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted k-means with heavy-ball momentum. Returns centres [K, g] and assignments.

        All points take part and many iterations pay: the start's local minimum is what the later
        rounds refine but never leave. Momentum makes 24 iterations better than 40 plain ones.
        """
        order = torch.randperm(len(points), generator=self.generator, device=points.device)
        # With fewer points than entries some start alike; `reseed_dead` moves them later.
        pick = torch.arange(self.size, device=points.device) % len(points)
        centres = points[order[pick]].clone()
        weighted = weights * points
        features = torch.cat([weighted, weights], 1)
        velocity = torch.zeros_like(centres)
        iterations = self.settings.kmeans_iterations
        for i in range(iterations):
            gather = _summing_matrix(_nearest(features, centres), self.size)
            mass = gather @ weights
            mean = (gather @ weighted) / mass.clamp_min(1e-30)
            to_mean = torch.where(mass > 0, mean - centres, 0)
            if i < iterations - 2:
                velocity = self.settings.kmeans_momentum * velocity + to_mean
                centres = centres + velocity
            else:  # end on plain steps, or the centres would still be swinging
                centres = centres + to_mean
        return centres, _nearest(features, centres)

    # ---- codes ----

    def assign_with_feedback(self) -> None:
        """Choose all codes left to right, carrying each group's error into the later groups."""
        identity = torch.eye(len(self.moment), device=self.moment.device)
        damping = self.settings.damping * self.moment.diagonal().mean()
        chol = torch.linalg.cholesky(self.moment + (damping + 1e-12) * identity)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(chol), upper=True)
        target = self.weight.clone()
        for start, stop in self._column_blocks():
            carried = torch.zeros(len(target), stop - start, device=target.device)
            for first in range(start, stop, self.g):
                group = slice(first, first + self.g)
                inverse = torch.linalg.inv(upper[group, group])
                metric = inverse @ inverse.T
                z = (target[:, group] @ metric) / self.scales
                value = self._choose(first // self.g, z, metric)
                error = (target[:, group] - self.scales * value) @ inverse
                carried[:, first - start : first - start + self.g] = error
                later = slice(first + self.g, stop)
                target[:, later] -= error @ upper[group, later]
            target[:, stop:] -= carried @ upper[start:stop, stop:]

    def sweep(self) -> None:
        """One pass over all groups: the best codes of a group given all others."""
        product = self.residual() @ self.moment  # R = E H, kept exact while codes change
        blocks = list(self._column_blocks())
        for index in self._permutation(len(blocks)):
            start, stop = blocks[index]
            inside = slice(start, stop)
            changes = torch.zeros(len(product), stop - start, device=product.device)
            for offset in self._permutation((stop - start) // self.g):
                local = slice(offset * self.g, (offset + 1) * self.g)
                group = slice(start + local.start, start + local.stop)
                metric = self.moment[group, group]
                old = self._value(group.start // self.g)
                z = product[:, group] / self.scales + old @ metric
                change = self.scales * (self._choose(group.start // self.g, z, metric) - old)
                changes[:, local] = change
                product[:, inside] -= change @ self.moment[group, inside]
            outside = changes @ self.moment[inside]
            product[:, :start] -= outside[:, :start]
            product[:, stop:] -= outside[:, stop:]

    def _value(self, group: int) -> Tensor:
        """Unscaled decoded value of one group, [out, g]."""
        books = range(len(self.codebooks))
        return torch.stack([self.codebooks[m][self.codes[:, group, m]] for m in books]).sum(0)

    def _choose(self, group: int, z: Tensor, metric: Tensor) -> Tensor:
        """Set the codes of one group to minimise u A u^T - 2 <u, z>, u the sum of entries.

        z [out, g], metric A [g, g]. Coordinate descent over codebooks in random order from the
        current codes. Returns the new u [out, g].
        """
        values = [book[self.codes[:, group, m]] for m, book in enumerate(self.codebooks)]
        for m in self._permutation(len(self.codebooks)):
            book = self.codebooks[m]
            others = sum(value for k, value in enumerate(values) if k != m)
            left = z - others @ metric if len(values) > 1 else z
            codes = _lowest(left, -2 * book, ((book @ metric) * book).sum(1))
            self.codes[:, group, m] = codes
            values[m] = book[codes]
        return torch.stack(values).sum(0)

    # ---- continuous parameters ----

    def fit_codebooks(self) -> None:
        """Conjugate gradients on the codebooks: the objective is quadratic in them."""
        gathers = [
            _summing_matrix(self.codes[..., m].reshape(-1), self.size)
            for m in range(len(self.codebooks))
        ]

        def collect(matrix: Tensor) -> Tensor:
            flat = (self.scales * (matrix @ self.moment)).reshape(-1, self.g)
            return torch.stack([gather @ flat for gather in gathers])

        gradient = collect(self.residual())
        # Jacobi preconditioner: the diagonal of the normal equations.
        diag = self.moment.diagonal().reshape(1, self.groups, self.g)
        flat = (self.scales.square().unsqueeze(-1) * diag).reshape(-1, self.g)
        inverse = torch.stack([gather @ flat for gather in gathers])
        inverse = torch.where(inverse > 0, 1 / inverse.clamp_min(1e-30), 0)
        step = inverse * gradient
        direction, strength = step, (gradient * step).sum()
        for _ in range(self.settings.cg_iterations):
            if float(strength) <= 1e-12 * self.energy:
                break
            image = collect(self.scales * self.unscaled(direction))
            length = strength / (direction * image).sum().clamp_min(1e-30)
            self.codebooks += length * direction
            gradient = gradient - length * image
            step = inverse * gradient
            renewed = (gradient * step).sum()
            direction = step + (renewed / strength) * direction
            strength = renewed

    def fit_scales(self) -> None:
        """s_o = <u_o, W_o>_H / <u_o, u_o>_H, exact given codes and codebooks."""
        value = self.unscaled()
        image = value @ self.moment
        norm = (image * value).sum(1, keepdim=True)
        best = (image * self.weight).sum(1, keepdim=True) / norm.clamp_min(1e-30)
        self.scales = torch.where((norm > 0) & (best > 1e-8), best, self.scales)

    def reseed_dead(self) -> int:
        """Move codebook entries that no group uses onto the groups of largest error."""
        dead = [
            (torch.bincount(self.codes[..., m].reshape(-1), minlength=self.size) == 0)
            .nonzero()
            .squeeze(1)
            for m in range(len(self.codebooks))
        ]
        total = sum(len(entries) for entries in dead)
        if total:
            left = (self.residual() / self.scales).reshape(-1, self.g)
            importance = self.moment.diagonal().reshape(1, self.groups, self.g)
            cost = (self.residual().reshape(-1, self.groups, self.g).square() * importance).sum(2)
            worst = cost.reshape(-1).topk(min(total, cost.numel())).indices
            for m, entries in enumerate(dead):
                chosen, worst = worst[: len(entries)], worst[len(entries) :]
                old = self.codebooks[m][self.codes[..., m].reshape(-1)[chosen]]
                self.codebooks[m][entries[: len(chosen)]] = old + left[chosen]
        return total

    # ---- helpers ----

    def _column_blocks(self) -> Iterator[tuple[int, int]]:
        width = max(self.g, self.settings.column_block // self.g * self.g)
        in_features = self.weight.shape[1]
        for start in range(0, in_features, width):
            yield start, min(start + width, in_features)

    def _permutation(self, count: int) -> list[int]:
        device = self.generator.device
        order: list[int] = torch.randperm(count, generator=self.generator, device=device).tolist()
        return order

    def result(self, dtype: torch.dtype) -> LayerFit:
        """Round to the storage type, refit the scales to the rounded codebooks, and pack."""
        self.codebooks = self.codebooks.to(dtype).float()
        self.fit_scales()
        self.scales = self.scales.to(dtype).float()
        layer = QuantizedLayer(
            self.codes.to(self.scheme.code_dtype),
            self.codebooks.to(dtype).unsqueeze(2),
            self.scales.to(dtype).reshape(-1, 1, 1, 1),
        )
        return LayerFit(layer, self.relative_error())


def fit_layer(
    weight: Tensor,
    second_moment: Tensor,
    scheme: Scheme,
    settings: FitSettings,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> LayerFit:
    """Quantise one weight [out, in] given H [in, in]; codebooks and scales are stored in `dtype`.

    Raises ValueError when the scheme does not divide the layer.
    """
    fit = AdditiveFit(weight, second_moment, scheme, settings, generator)
    fit.start()
    fit.assign_with_feedback()
    for _ in range(settings.rounds):
        fit.fit_codebooks()
        fit.fit_scales()
        fit.reseed_dead()
        fit.sweep()
    fit.fit_codebooks()
    fit.fit_scales()
    return fit.result(dtype)


def _nearest(features: Tensor, centres: Tensor) -> Tensor:
    """Nearest centre per point; features are [weights * points, weights], [points, 2g]."""
    return _lowest(features, torch.cat([-2 * centres, centres.square()], 1))


def _lowest(features: Tensor, entries: Tensor, offset: Tensor | None = None) -> Tensor:
    """argmin over entries of <feature, entry> (+ offset per entry), never holding all scores.

    features [n, d], entries [K, d], offset [K] -> [n].
    """
    columns = entries.T.contiguous()
    parts = []
    for part in torch.split(features, max(64, (1 << 18) // len(entries))):  # about 1 MiB of scores
        scores = part @ columns if offset is None else torch.addmm(offset, part, columns)
        parts.append(_argmin_rows(scores))
    return torch.cat(parts)


def _argmin_rows(scores: Tensor) -> Tensor:
    """argmin of every row of float32 scores [n, K], which it overwrites.

    torch's min with indices is scalar code on CPU, its amin is vectorised. So up to 256 columns
    put their number into the low 8 bits of the mantissa and come out with the minimum: twice as
    fast with the product included. Scores closer than 2^-15 of their size count as equal.
    """
    columns = scores.shape[1]
    if columns > 256 or scores.device.type != "cpu":
        return scores.min(1).indices
    bits = scores.view(torch.int32)
    bits.bitwise_and_(-256).bitwise_or_(torch.arange(columns, dtype=torch.int32))
    return scores.amin(1).view(torch.int32).bitwise_and_(255).long()


def _summing_matrix(index: Tensor, size: int) -> Tensor:
    """Sparse [size, len(index)] matrix that sums rows by index.

    A product with it is deterministic and, on CPU, ten times faster than index_add_.
    """
    order = index.argsort(stable=True)
    ends = torch.bincount(index, minlength=size).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    ones = torch.ones(len(index), device=index.device)
    with warnings.catch_warnings():  # "CSR is in beta": the product is all that is used
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            starts, order, ones, (size, len(index)), check_invariants=False
        )
