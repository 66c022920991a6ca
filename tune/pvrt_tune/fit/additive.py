"""One linear layer in additive codebooks, fitted in the metric of its inputs.

Minimises tr(E H E^T) with E = W - s * sum_m C_m[b_m] and H = mean of x x^T over calibration tokens
(arXiv 2401.06118, section 3; H is the layer's input second moment):

    start        k-means on rows / scale, one codebook after the other, each coordinate weighted by
                 the part of the loss that later inputs cannot make up for
    assignment   group by group, those of high-variance channels first; the error is carried into
                 the groups to come (as GPTQ does, here with whole groups)
    rounds of    codebooks by conjugate gradients and scales in closed form (both are linear given
                 the codes), then a sweep over all codes on the exact objective

Shapes: W [out, in], H [in, in], codes [out, groups, M], codebooks C [M, K, g], scales s [out, 1].
Everything is float32 and on the weight's device; random draws come from a generator of the CPU. A
run is deterministic for one seed, machine and thread count.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.scheme import Scheme
from pvrt_tune.fit import nearest_sums
from pvrt_tune.fit.code_search import Cells, halve, lowest, search_bytes, weighted
from pvrt_tune.fit.codebooks import cells_of, searched_together, starts
from pvrt_tune.fit.exchange import CONTINUATIONS, Exchange, nearest_choices
from pvrt_tune.fit.kmeans import Schedule, kmeans, summing_matrix
from pvrt_tune.fit.nearest_sums import search_codes, values_of
from pvrt_tune.fit.objective import Objective, column_blocks, feedback_bytes
from pvrt_tune.settings import FitSettings

# Power of the conditional second moment that weights k-means. Sweeps can still make up for a part
# of every error, so high-variance channels matter less than the plain metric says: two layers of
# SmolLM2 come to errors of 0.0077 and 0.0085, and with diag(H) itself to 0.0081 and 0.0094.
_IMPORTANCE_POWER = 0.65
# Share of a metric's mean diagonal that is added to it, so that it has a root.
_SINGULAR = 1e-6


@dataclass(frozen=True)
class LayerFit:
    """A fitted layer as it is stored and its relative error tr(EHE^T) / tr(WHW^T)."""

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
        self.groups, self.cells = in_features // self.g, cells_of(scheme)
        self.scheme, self.settings, self.generator = scheme, settings, generator
        self.objective = Objective(weight, second_moment)
        self.weight, self.moment = self.objective.weight, self.objective.moment
        # A row of zeros still needs a scale to divide by.
        self.scales = self.weight.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8)
        self.codebooks = self.weight.new_zeros(scheme.num_codebooks, self.size, self.g)
        self.codes = weight.new_zeros(out, self.groups, scheme.num_codebooks, dtype=torch.int64)

    # ---- quantities ----

    def unscaled(self, codebooks: Tensor | None = None) -> Tensor:
        """Sum of the chosen codewords, [out, in]."""
        return self._value(self.codes, codebooks).reshape(self.weight.shape)

    def residual(self) -> Tensor:
        """W minus its quantised version, [out, in]."""
        return self.weight - self.scales * self.unscaled()

    def relative_error(self) -> float:
        """tr(E H E^T) / tr(W H W^T)."""
        return self.objective.relative_error(self.scales * self.unscaled())

    @cached_property
    def _order(self) -> Tensor:
        """Groups by how sensitive the loss is to them, most sensitive first."""
        sensitivity = self.moment.diagonal().view(self.groups, self.g).sum(1)
        return sensitivity.argsort(descending=True, stable=True)

    @cached_property
    def _columns(self) -> Tensor:
        """Inputs in the order of `_order`."""
        inside = torch.arange(self.g, device=self._order.device)
        return (self._order.unsqueeze(1) * self.g + inside).reshape(-1)

    @cached_property
    def _feedback(self) -> Tensor:
        """Factor that carries errors into later inputs, both in the order of `_columns`."""
        return self.objective.feedback(self.settings.damping, self._columns)

    @cached_property
    def _conditional(self) -> Tensor:
        """Roots [groups, g, g] of the metrics of ordered groups: inverses of the factor's blocks.

        A metric is root @ root^T, the Schur complement of all later groups in H: the loss of a
        group's error once those have made the best of it.
        """
        blocks = self._feedback.view(self.groups, self.g, self.groups, self.g).diagonal(0, 0, 2)
        roots: Tensor = torch.linalg.inv(blocks.permute(2, 0, 1))
        return roots

    @cached_property
    def _given_others(self) -> tuple[Tensor, Tensor]:
        """Roots of the metrics of groups as they are if all others stay, and their inverses."""
        blocks = self.moment.view(self.groups, self.g, self.groups, self.g).diagonal(0, 0, 2)
        metrics = blocks.permute(2, 0, 1).clone()
        # Inputs of a group may be all zero, or depend on each other.
        diagonal = metrics.diagonal(dim1=1, dim2=2)
        diagonal += _SINGULAR * diagonal.mean(1, keepdim=True) + 1e-30
        roots = torch.linalg.cholesky(metrics)
        return roots, torch.linalg.inv(roots)

    # ---- start ----

    def start(self) -> None:
        """Residual k-means on the scaled rows, each coordinate weighted by its own importance."""
        effort, codes = self.settings, self.codes.view(-1, len(self.codebooks))
        schedule = Schedule(
            effort.kmeans_iterations, effort.kmeans_momentum, self.cells, effort.probes
        )
        points, weights = self._points()
        for m, inside in enumerate(starts(self.scheme)):
            own = points[:, inside].contiguous(), weights[:, inside].contiguous()
            found = kmeans(*own, self.size, schedule, self.generator)
            self.codebooks[m][:, inside], codes[:, m] = found
            points = points - self.codebooks[m][codes[:, m]]

    def encode(self, codebooks: Tensor) -> None:
        """First codes for codebooks [M, K, g] fitted elsewhere, one after the other as in `start`.

        From these, searches end 2 to 5 dB lower than from none (embeddings of SmolLM2).
        """
        self.codebooks, codes = codebooks, self.codes.view(-1, len(codebooks))
        points, weights = self._points()
        for m, codebook in enumerate(codebooks):
            features = torch.cat([weights * points, weights], 1)
            codes[:, m] = lowest(features, *weighted(codebook))[:, 0]
            points = points - codebook[codes[:, m]]

    def _points(self) -> tuple[Tensor, Tensor]:
        """All groups of the scaled rows [n, g], and weights of their coordinates."""
        weights = self.importance() * self.scales.square().unsqueeze(-1)
        return (self.weight / self.scales).reshape(-1, self.g), weights.reshape(-1, self.g)

    def importance(self) -> Tensor:
        """Weight of every input in the start's k-means, [groups, g]."""
        metrics = self._conditional.square().sum(2)  # their diagonals
        importance = torch.empty_like(metrics)
        importance[self._order] = metrics.pow(_IMPORTANCE_POWER)
        return importance + 1e-6 * importance.mean()

    # ---- codes ----

    def assign_with_feedback(self) -> None:
        """Choose all codes group by group, carrying each group's error into the later groups."""
        upper, order = self._feedback, self._order.tolist()
        roots = self._conditional
        target = self.weight[:, self._columns]
        exchange = self._exchange()
        for start, stop in self._column_blocks():
            carried = torch.zeros(len(target), stop - start, device=target.device)
            for first in range(start, stop, self.g):
                group = slice(first, first + self.g)
                root = roots[first // self.g]
                wanted = (target[:, group] @ root) / self.scales
                value = self._choose(order[first // self.g], wanted, root, exchange)
                error = (target[:, group] - self.scales * value) @ root
                carried[:, first - start : first - start + self.g] = error
                later = slice(first + self.g, stop)
                target[:, later] -= error @ upper[group, later]
            target[:, stop:] -= carried @ upper[start:stop, stop:]

    def sweep(self) -> None:
        """One pass over all groups: the best codes of a group given all others."""
        product = self.residual() @ self.moment  # R = E H, kept exact while codes change
        roots, inverses = self._given_others
        blocks = self._column_blocks()
        exchange = self._exchange()
        for block in self._permutation(len(blocks)):
            start, stop = blocks[block]
            inside = slice(start, stop)
            changes = torch.zeros(len(product), stop - start, device=product.device)
            for offset in self._permutation((stop - start) // self.g):
                local = slice(offset * self.g, (offset + 1) * self.g)
                group = slice(start + local.start, start + local.stop)
                number = group.start // self.g
                root, old = roots[number], self._value(self.codes[:, number])
                wanted = (product[:, group] / self.scales) @ inverses[number].T + old @ root
                new = self._choose(number, wanted, root, exchange)
                change = self.scales * (new - old)
                changes[:, local] = change
                product[:, inside] -= change @ self.moment[group, inside]
            outside = changes @ self.moment[inside]
            product[:, :start] -= outside[:, :start]
            product[:, stop:] -= outside[:, stop:]

    def _value(self, codes: Tensor, codebooks: Tensor | None = None) -> Tensor:
        """Unscaled decoded value [..., g] of codes [..., M]."""
        return values_of(self.codebooks if codebooks is None else codebooks, codes)

    def _exchange(self) -> Exchange | None:
        """None where codes are searched together. Cells of large codebooks are cut anew, because
        codewords move.
        """
        if searched_together(self.scheme):
            return None
        cells: list[Cells | None] = [None] * len(self.codebooks)
        if self.cells > 1:
            deviation = self.moment.diagonal().view(self.groups, self.g).mean(0).sqrt()
            cells = [Cells(halve(codebook * deviation, self.cells)) for codebook in self.codebooks]
        return Exchange(self.settings.beam, self.settings.probes, cells)

    def _choose(
        self, group: int, wanted: Tensor, root: Tensor, exchange: Exchange | None
    ) -> Tensor:
        """Set the codes of one group so that the sum u of codewords minimises |u root - wanted|.

        wanted [out, g], root [g, g] of the metric. Never ends above the current codes. Returns the
        new u [out, g].
        """
        books, current = self.codebooks @ root, self.codes[:, group].unsqueeze(1)
        if exchange is None:
            found = search_codes(wanted, books)
        else:
            found = exchange.search(current, wanted, books, self._permutation(len(books)))
        kept, _ = nearest_choices(torch.cat([current, found], 1), wanted, books, 1)
        self.codes[:, group] = kept[:, 0]
        return self._value(kept[:, 0])

    def fit_codebooks(self) -> None:
        """Conjugate gradients on the codebooks: the objective is quadratic in them."""
        gathers = [summing_matrix(codes.reshape(-1), self.size) for codes in self.codes.unbind(2)]

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
            if float(strength) <= 1e-12 * self.objective.power:
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
        """Move codewords that no group uses onto the groups of largest error."""
        unused = torch.ones(len(self.codebooks), self.size, device=self.codes.device).bool()
        for codewords, codes in zip(unused, self.codes.unbind(2), strict=True):
            codewords.index_fill_(0, codes.reshape(-1), False)
        dead = [codewords.nonzero().squeeze(1) for codewords in unused]
        total = sum(len(codewords) for codewords in dead)
        if total:
            left = (self.residual() / self.scales).reshape(-1, self.g)
            importance = self.moment.diagonal().reshape(1, self.groups, self.g)
            cost = (self.residual().reshape(-1, self.groups, self.g).square() * importance).sum(2)
            worst = cost.reshape(-1).topk(min(total, cost.numel())).indices
            for m, codewords in enumerate(dead):
                chosen, worst = worst[: len(codewords)], worst[len(codewords) :]
                old = self.codebooks[m][self.codes[..., m].reshape(-1)[chosen]]
                self.codebooks[m][codewords[: len(chosen)]] = old + left[chosen]
        return total

    # ---- helpers ----

    def _column_blocks(self) -> list[tuple[int, int]]:
        return list(column_blocks(len(self.moment), self.g, self.settings.column_block))

    def _permutation(self, count: int) -> list[int]:
        return list(torch.randperm(count, generator=self.generator).tolist())

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
) -> AdditiveFit:
    """Quantise one weight [out, in] given H [in, in]; `result` rounds it to what is stored.

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
    return fit


def peak_bytes(shape: tuple[int, int], scheme: Scheme, settings: FitSettings, device: str) -> int:
    """Peak of one layer's fit [out, in] on a device, beyond its weight and moment in float32."""
    out, in_features = shape
    weight, moment = 4 * out * in_features, 4 * in_features**2
    books, g = scheme.num_codebooks, scheme.in_group_size
    groups, cells = out * in_features // g, cells_of(scheme)
    together = searched_together(scheme)
    # Joint choices of a group before the best are kept: what continues a beam, and the present one.
    beam = 1
    if not together and books > 1:
        beam = settings.beam * (1 if books == 2 else CONTINUATIONS)
    kept = max(1, min(beam, settings.beam))

    def search(queries: int, width: int) -> int:
        sizes = queries, width, scheme.codebook_size, cells
        return search_bytes(sizes, settings.probes, device)

    # Codes (int64), codebooks, scales, and orders of inputs.
    state = 8 * groups * books + 4 * books * scheme.codebook_size * g + 8 * (out + 2 * in_features)
    peaks = (
        feedback_bytes(in_features, device),
        # From here on with the factor that carries errors. k-means: points, weights and their
        # product become features of twice their length; then their search.
        moment + 5 * weight,
        moment + 4 * weight + 8 * groups + search(groups, 2 * g),
        # Conjugate gradients: a product with H, and a matrix that sums groups by codeword (its
        # order, and ones) for every codebook.
        moment + 3 * weight + 20 * groups + 12 * groups * books,
        # A sweep: E H, changes and a product of these. Then a search for continuations: codes,
        # values, and what they leave twice. Or losses of all choices: codes twice, and three more
        # of the size of their values.
        moment
        + 3 * weight
        + 4 * out * kept * (2 * books + 3 * g)
        + (nearest_sums.peak_bytes(out, scheme, device) if together else search(out * kept, g)),
        moment + 3 * weight + 4 * out * (beam + 1) * (4 * books + 4 * g),
    )
    return state + max(peaks)
