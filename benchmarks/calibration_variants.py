"""Other ways to fit, tried and measured by calibration_layers.py; none is in the product."""

import torch
from torch import Tensor

from pvrt.format.scheme import GridScheme
from pvrt_tune.fit.additive import AdditiveFit
from pvrt_tune.fit.code_search import lowest
from pvrt_tune.fit.kmeans import summing_matrix
from pvrt_tune.fit.objective import Objective


class NoFeedback(AdditiveFit):
    """The start's codes go straight into the sweeps."""

    def assign_with_feedback(self) -> None:
        """Keep the codes of the start."""


class PlainImportance(AdditiveFit):
    """k-means weighted by diag(H) itself."""

    def importance(self) -> Tensor:
        """diag(H)."""
        return self.moment.diagonal().clamp_min(0).view(self.groups, self.g)


class WeightSpaceStart(AdditiveFit):
    """k-means that does not see H."""

    def importance(self) -> Tensor:
        """One everywhere."""
        return torch.ones(self.groups, self.g)


class NaturalOrder(AdditiveFit):
    """Error feedback from the first input to the last, as the original GPTQ does."""

    @property
    def _order(self) -> Tensor:
        return torch.arange(self.groups)


class ScaleOfOutputs(AdditiveFit):
    """Initial scales by the rows' output energy in place of their weights'."""

    def start(self) -> None:
        """Scale rows by sqrt(w H w^T / mean diag H), then as usual."""
        energy = ((self.weight @ self.moment) * self.weight).sum(1, keepdim=True)
        loudness = self.moment.diagonal().mean() * self.weight.shape[1]
        self.scales = (energy / loudness).sqrt().clamp_min(1e-8)
        super().start()


class FullMetric(AdditiveFit):
    """k-means in the full g x g conditional metric of every group in place of its diagonal."""

    def start(self) -> None:
        """Scores <[A x, vec A], [-2 c, vec c c^T]>; a g x g system per centre."""
        g, size = self.g, self.size
        metrics = torch.empty(self.groups, g, g)
        firsts = range(0, len(self.moment), g)
        metrics[self._order] = torch.stack([self._conditional(first)[1] for first in firsts])
        row, column = torch.triu_indices(g, g)
        twice = torch.where(row == column, 1.0, 2.0)
        square = self.scales.square().unsqueeze(2)
        curvature = (square * metrics[:, row, column]).reshape(-1, len(row))
        points = (self.weight / self.scales).reshape(-1, g)
        for m in range(len(self.codebooks)):
            grouped = points.view(-1, self.groups, g)
            image = square * torch.einsum("ojk,jkl->ojl", grouped, metrics)
            features = torch.cat([image.reshape(-1, g), curvature], 1)

            def nearest(centres: Tensor, features: Tensor = features) -> Tensor:
                outer = centres[:, row] * centres[:, column] * twice
                rows = torch.cat([-2 * centres, outer], 1)
                return lowest(features, rows, centres.new_zeros(size))[:, 0]

            pick = torch.randperm(len(points), generator=self.generator)[:size]
            centres, velocity = points[pick], torch.zeros(size, g)
            for i in range(self.settings.kmeans_iterations):
                sums = summing_matrix(nearest(centres), size) @ features
                system = torch.zeros(size, g, g)
                system[:, row, column] = system[:, column, row] = sums[:, g:]
                trace = system.diagonal(dim1=1, dim2=2).mean(1)
                system += (1e-5 * trace + 1e-20)[:, None, None] * torch.eye(g)
                to_mean = torch.linalg.solve(system, sums[:, :g]) - centres
                to_mean = torch.where(trace[:, None] > 0, to_mean, 0)
                swing = i < self.settings.kmeans_iterations - 2
                velocity = to_mean + (self.settings.kmeans_momentum * velocity if swing else 0)
                centres = centres + velocity
            self.codebooks[m], self.codes[..., m] = centres, nearest(centres).view(-1, self.groups)
            points = points - centres[self.codes[..., m].reshape(-1)]


def plain_grid(weight: Tensor, moment: Tensor, scheme: GridScheme, feedback: bool) -> Tensor:
    """A textbook grid: ranges from the least to the greatest weight when a group begins, rounding,
    and on request GPTQ's error feedback (damping 1 %, natural order)."""
    rest, result = weight.clone(), torch.zeros_like(weight)
    upper = Objective(weight, moment).feedback(0.01)
    for i in range(weight.shape[1]):
        if i % scheme.group_size == 0:
            group = rest[:, i : i + scheme.group_size]
            low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
            if scheme.symmetric:
                high = torch.maximum(-low, high)
                low = -high
            scale = ((high - low) / scheme.levels).clamp_min(1e-8)
            middle = torch.full_like(scale, (scheme.levels + 1) // 2)
            zero = middle if scheme.symmetric else (-low / scale).round()
        code = (rest[:, i] / scale + zero).round().clamp(0, scheme.levels)
        result[:, i] = scale * (code - zero)
        if feedback:
            error = (rest[:, i] - result[:, i]) / upper[i, i]
            rest[:, i + 1 :].addr_(error, upper[i, i + 1 :], alpha=-1)
    return result
