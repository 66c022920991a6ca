"""Noise in the place of a quantiser's error: as large, and of the same shape."""

import torch

from pvrt.format.scheme import Scheme
from pvrt_tune.allocate.noise import coarsest, rows_like, shaped
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.fit.objective import Objective
from pvrt_tune.randomness import seeded
from pvrt_tune.settings import FitSettings


def layer(out: int = 128, inputs: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and a second moment of inputs that are correlated and of very different sizes."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(out, inputs, generator=draw) * (0.5 + torch.rand(out, 1, generator=draw))
    sizes = torch.logspace(0, -2, inputs)
    x = torch.randn(2048, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    x = x * sizes
    return weight, x.T @ x / len(x)


def test_noise_has_a_relative_error_of_one_and_repeats() -> None:
    weight, moment = layer()
    error = shaped(weight, moment, 0.01, seeded(0, "a"))
    assert abs(Objective(weight, moment).relative_error(weight - error) - 1) < 1e-4
    assert torch.equal(error, shaped(weight, moment, 0.01, seeded(0, "a")))
    assert not torch.equal(error, shaped(weight, moment, 0.01, seeded(0, "b")))


def test_noise_lies_where_a_fit_leaves_its_error() -> None:
    weight, moment = layer()
    settings = FitSettings(rounds=1, kmeans_iterations=6, beam=2)
    fit = fit_layer(weight, moment, Scheme.parse("1x8g8"), settings, seeded(0, "fit"))
    left = fit.residual()
    noise = shaped(weight, moment, 0.01, seeded(0, "noise"))
    plain = rows_like(weight, seeded(0, "noise"))
    values, axes = torch.linalg.eigh(moment)

    def share(error: torch.Tensor) -> float:
        """Of the loss in the eighth of directions that inputs are largest in."""
        loss = (error @ axes).square().sum(0) * values
        return float(loss[-len(values) // 8 :].sum() / loss.sum())

    assert abs(share(noise) - share(left)) < 0.3 * abs(share(plain) - share(left))


def test_what_rounding_would_leave_goes_with_what_fits_leave() -> None:
    weight, moment = layer(512)
    white = torch.eye(len(moment))
    settings = FitSettings(rounds=0, kmeans_iterations=4, beam=1)
    scheme = Scheme.parse("1x8g8")
    ratios = [
        fit_layer(weight, h, scheme, settings, seeded(0, "fit")).relative_error()
        / coarsest(weight, h, 0.01)
        for h in (white, moment)
    ]
    assert coarsest(weight, white, 0.01) / coarsest(weight, moment, 0.01) > 2
    assert 0.4 < ratios[0] / ratios[1] < 2.5
