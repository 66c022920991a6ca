"""One layer's fit: every step lowers the exact objective, and the result is what is stored."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize
from pvrt_tune.fit import additive
from pvrt_tune.fit.additive import AdditiveFit, fit_layer
from pvrt_tune.settings import FitSettings

QUICK = FitSettings(rounds=2, kmeans_iterations=6)


# Every scheme on offer, and how much a random 48 x 64 layer (384 groups of 8) may lose by it.
SCHEMES = {
    "2x8g8": 0.05,
    "1x8g8": 0.15,
    "1x8g4": 0.05,
    "2x12g8": 1e-4,
    "3x8g8": 0.01,
    "4x8g8": 0.002,
    "1x16g8": 1e-4,
    "1x16g16": 1e-4,
}


def problem(out: int = 48, in_features: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs with a few high-variance channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_features, generator=generator)
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    x = torch.randn(2000, in_features, generator=generator) @ (mix + torch.eye(in_features))
    x[:, :3] *= 8
    return weight, x.T @ x / len(x)


def fit_of(scheme: str = "2x6g8", settings: FitSettings = QUICK) -> AdditiveFit:
    weight, moment = problem()
    generator = torch.Generator().manual_seed(1)
    return AdditiveFit(weight, moment, Scheme.parse(scheme), settings, generator)


@pytest.mark.parametrize("scheme", ["1x6g8", "2x6g8", "3x4g4"])
def test_every_step_lowers_the_objective(scheme: str) -> None:
    fit = fit_of(scheme)
    fit.start()
    start = fit.relative_error()
    fit.assign_with_feedback()
    errors = [fit.relative_error()]
    assert errors[0] < start
    for _ in range(3):
        for step in (fit.fit_codebooks, fit.fit_scales, fit.sweep):
            step()
            errors.append(fit.relative_error())
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_fits(scheme: str) -> None:
    """With as many entries as groups a layer is stored as it is, to the precision of float16."""
    weight, moment = problem()
    form = Scheme.parse(scheme)
    fit = fit_layer(weight, moment, form, QUICK, torch.Generator()).result(torch.float16)
    layer = fit.layer
    assert layer.codes.dtype is form.code_dtype
    assert layer.codes.shape == form.codes_shape(48, 64)
    assert layer.codebooks.shape == form.codebooks_shape
    decoded = aqlm_dequantize(layer.codes, layer.codebooks.float(), layer.scales.float())
    error = weight - decoded
    exact = ((error @ moment) * error).sum() / ((weight @ moment) * weight).sum()
    assert fit.relative_error == pytest.approx(float(exact), rel=1e-3, abs=1e-8)
    assert fit.relative_error < SCHEMES[scheme]


def test_a_large_codebook_searched_in_two_levels_is_nearly_as_good() -> None:
    """8,192 groups on 4,096 entries: pruning costs less than a tenth of the error."""
    weight, moment = problem(out=256, in_features=256)
    scheme, errors = Scheme.parse("1x12g8"), []
    for probes in (8, 64):  # 64 of 64 cells is every entry
        settings = replace(QUICK, probes=probes)
        generator = torch.Generator().manual_seed(0)
        fit = AdditiveFit(weight, moment, scheme, settings, generator)
        fit.start()
        fit.assign_with_feedback()
        errors.append(fit.relative_error())
        for step in (fit.fit_codebooks, fit.fit_scales, fit.sweep):
            step()
            assert fit.relative_error() <= errors[-1] * (1 + 1e-5)
            errors[-1] = fit.relative_error()
    assert errors[1] <= errors[0] <= 1.1 * errors[1]


def test_a_wider_beam_finds_better_codes() -> None:
    errors = []
    for beam in (1, 4, 16):
        fit = fit_of("4x6g8", replace(QUICK, beam=beam))
        fit.start()
        for _ in range(3):
            fit.sweep()
        errors.append(fit.relative_error())
    assert errors[2] < errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize("scheme", ["1x6g8", "2x3g8", "4x2g8"])
def test_the_nearest_sum_is_chosen(scheme: str) -> None:
    """Both searches see every sum of so few; an exchange from four codes on may miss some."""
    fit = fit_of(scheme, replace(QUICK, beam=64))
    fit.start()
    root = torch.linalg.cholesky(fit.moment[8:16, 8:16])
    wanted = torch.randn(48, 8, generator=torch.Generator().manual_seed(2))
    value = fit._choose(1, wanted, root, fit._exchange())
    assert torch.equal(value, fit._value(fit.codes[:, 1]))
    sums = torch.zeros(1, 8)
    for codebook in fit.codebooks:
        sums = (sums[:, None] + codebook).flatten(0, 1)
    best = (wanted[:, None] - sums @ root).square().sum(2).amin(1)
    chosen = (wanted - value @ root).square().sum(1)
    missed = (chosen - best) / best
    assert missed.mean() < 0.1
    assert scheme == "4x2g8" or missed.max() < 1e-4


def test_codebooks_searched_together_end_lower_than_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no choice is ever worse than the codes that are there."""
    weight, moment = problem(out=256, in_features=64)
    errors = []
    for together in (True, False):
        monkeypatch.setattr(additive, "searched_together", lambda scheme, how=together: how)
        fit = AdditiveFit(weight, moment, Scheme.parse("3x5g8"), QUICK, torch.Generator())
        fit.start()
        fit.assign_with_feedback()
        for _ in range(2):
            before = fit.relative_error()
            fit.sweep()
            assert fit.relative_error() <= before * (1 + 1e-5)
        errors.append(fit.relative_error())
    assert errors[0] < 0.9 * errors[1]


def test_the_codebook_fit_solves_the_normal_equations() -> None:
    fit = fit_of("1x4g8", FitSettings(cg_iterations=400))
    fit.start()
    fit.fit_codebooks()
    best = fit.relative_error()
    for _ in range(5):
        kick = 1e-3 * torch.randn(fit.codebooks.shape, generator=torch.Generator().manual_seed(3))
        fit.codebooks += kick
        assert fit.relative_error() > best
        fit.codebooks -= kick


def test_a_sweep_leaves_single_codes_optimal() -> None:
    """After enough sweeps no change of one code lowers the error: checked by trying all of them."""
    fit = fit_of("1x3g8")
    fit.start()
    for _ in range(20):
        fit.sweep()
    best = fit.relative_error()
    for row, group in ((0, 0), (7, 3), (40, 7)):
        kept = fit.codes[row, group, 0].item()
        for code in range(8):
            fit.codes[row, group, 0] = code
            assert fit.relative_error() >= best - 1e-6
        fit.codes[row, group, 0] = kept


def test_scales_are_optimal_in_closed_form() -> None:
    fit = fit_of()
    fit.start()
    fit.fit_scales()
    best = fit.relative_error()
    for factor in (0.99, 1.01):
        fit.scales *= factor
        assert fit.relative_error() > best
        fit.scales /= factor


def test_unused_entries_come_back_to_life() -> None:
    fit = fit_of("1x6g8")
    fit.start()
    fit.codes[fit.codes == 5] = 6
    assert fit.reseed_dead() >= 1
    before = fit.relative_error()
    fit.sweep()
    assert fit.relative_error() < before
    assert (fit.codes == 5).any()


def test_the_reported_error_is_that_of_the_stored_tensors() -> None:
    weight, moment = problem()
    scheme = Scheme.parse("2x6g8")
    result = fit_layer(weight, moment, scheme, QUICK, torch.Generator()).result(torch.bfloat16)
    layer = result.layer
    assert layer.codebooks.dtype is torch.bfloat16
    decoded = aqlm_dequantize(layer.codes, layer.codebooks.float(), layer.scales.float())
    error = (weight - decoded).double()
    exact = ((error @ moment.double()) * error).sum() / (
        (weight.double() @ moment.double()) * weight.double()
    ).sum()
    assert result.relative_error == pytest.approx(float(exact), rel=1e-3)


def test_the_metric_matters() -> None:
    """A fit in the metric of the inputs beats one in plain weight space, in that metric."""
    weight, moment = problem()
    scheme = Scheme.parse("2x6g8")
    aware = fit_layer(weight, moment, scheme, QUICK, torch.Generator()).result(torch.float32)
    blind = fit_layer(weight, torch.eye(64), scheme, QUICK, torch.Generator()).result(torch.float32)
    decoded = aqlm_dequantize(blind.layer.codes, blind.layer.codebooks, blind.layer.scales)
    error = weight - decoded
    blind_error = ((error @ moment) * error).sum() / ((weight @ moment) * weight).sum()
    assert aware.relative_error < 0.7 * float(blind_error)


@pytest.mark.parametrize("scheme", ["2x6g8", "3x8g8", "1x11g4", "1x16g8"])
def test_the_same_seed_gives_the_same_bytes(scheme: str) -> None:
    weight, moment = problem(out=160)
    fits = [
        fit_layer(
            weight,
            moment,
            Scheme.parse(scheme),
            QUICK,
            torch.Generator().manual_seed(5),
        )
        .result(torch.float16)
        .layer
        for _ in range(2)
    ]
    assert torch.equal(fits[0].codes, fits[1].codes)
    assert torch.equal(fits[0].codebooks, fits[1].codebooks)
    assert torch.equal(fits[0].scales, fits[1].scales)


@pytest.mark.parametrize("case", ["zero weight", "zero row", "dead input", "one token"])
def test_degenerate_layers_stay_finite(case: str) -> None:
    weight, moment = problem(out=16, in_features=32)
    if case == "zero weight":
        weight.zero_()
    elif case == "zero row":
        weight[3].zero_()
    elif case == "dead input":
        moment[5], moment[:, 5] = 0, 0
    else:
        moment = torch.outer(moment[0], moment[0])
    result = fit_layer(weight, moment, Scheme.parse("2x8g8"), QUICK, torch.Generator()).result(
        torch.float16
    )
    layer = result.layer
    assert bool(torch.isfinite(layer.codebooks).all())
    assert bool(torch.isfinite(layer.scales).all())
    if case == "zero weight":
        decoded = aqlm_dequantize(layer.codes, layer.codebooks, layer.scales)
        assert float(decoded.abs().max()) < 1e-3


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot fit scheme 2x8g8 to a 8 x 12 layer"):
        fit_layer(
            torch.ones(8, 12),
            torch.eye(12),
            Scheme.parse("2x8g8"),
            QUICK,
            torch.Generator(),
        )
