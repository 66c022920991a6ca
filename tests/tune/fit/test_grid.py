"""Scalar grids: every step lowers the exact objective, and a tuned folder runs in stock engines."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pvrt.format.grid import GridCheckpoint
from pvrt.format.scheme import GridScheme
from pvrt.tools.report import describe
from pvrt_tune.fit.grid import GridFit, GridLayerFit, GridLinear, fit_grid
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import FitSettings, TuneJob
from tests.fixtures.plain_grid import plain_grid
from tests.tune.fit.test_additive import problem
from tests.tune.test_pipeline import QUICK, dense_folder, silent

GRIDS = ("w2g16", "w2g32s", "w3g64", "w3g16s", "w4g32", "w4g64s", "w8g64")
SETTINGS = FitSettings(rounds=3)


def module(fit: GridLayerFit, scheme: GridScheme) -> GridLinear:
    linear = GridLinear(fit.codes.shape[1], fit.codes.shape[0], scheme, dtype=fit.scales.dtype)
    state = {"codes": fit.codes, "scales": fit.scales, "zeros": fit.zeros}
    linear.load_state_dict({name: t for name, t in state.items() if t is not None})
    return linear


def relative(weight: Tensor, moment: Tensor, quantised: Tensor) -> float:
    error = (weight - quantised).double()
    power = ((weight.double() @ moment.double()) * weight.double()).sum()
    return float(((error @ moment.double()) * error).sum() / power)


@pytest.mark.parametrize("scheme", GRIDS)
def test_every_step_lowers_the_objective(scheme: str) -> None:
    fit = GridFit(*problem(), GridScheme.parse(scheme), SETTINGS)
    fit.start()
    errors = [fit.relative_error()]
    fit.assign_with_feedback()
    errors.append(fit.relative_error())
    for _ in range(3):
        fit.sweep()
        errors.append(fit.relative_error())
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))
    assert errors[-1] < 0.95 * errors[1]
    assert int(fit.codes.min()) >= 0 and int(fit.codes.max()) <= fit.levels


@pytest.mark.parametrize("scheme", ["w2g16", "w3g16s", "w4g32", "w4g64s"])
def test_the_fit_beats_rounding_and_plain_gptq(scheme: str) -> None:
    (weight, moment), form = problem(out=96, in_features=128), GridScheme.parse(scheme)
    mine = fit_grid(weight, moment, form, SETTINGS).result(torch.float32).relative_error
    gptq = relative(weight, moment, plain_grid(weight, moment, form, feedback=True))
    rounded = relative(weight, moment, plain_grid(weight, moment, form, feedback=False))
    assert mine < 0.85 * gptq
    assert gptq < rounded


def test_a_sweep_leaves_single_codes_optimal() -> None:
    fit = GridFit(*problem(), GridScheme.parse("w3g16"), SETTINGS)
    fit.start()
    for _ in range(20):
        fit.sweep()
    fit.sweep(fit_scales=False)
    best = fit.relative_error()
    for row, column in ((0, 0), (7, 31), (40, 63)):
        kept = fit.codes[row, column].item()
        for code in range(8):
            fit.codes[row, column] = code
            assert fit.relative_error() >= best - 1e-7
        fit.codes[row, column] = kept


@pytest.mark.parametrize("scheme", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reported_error_is_that_of_the_stored_tensors(scheme: str, dtype: torch.dtype) -> None:
    (weight, moment), form = problem(), GridScheme.parse(scheme)
    fit = fit_grid(weight, moment, form, SETTINGS).result(dtype)
    assert fit.scales.dtype is dtype
    assert (fit.zeros is None) is form.symmetric
    decoded = module(fit, form).float().dequantize().detach()
    assert fit.relative_error == pytest.approx(relative(weight, moment, decoded), rel=1e-3)


def test_the_same_layer_gives_the_same_bytes() -> None:
    form = GridScheme.parse("w3g16")
    fits = [fit_grid(*problem(), form, SETTINGS).result(torch.float16) for _ in range(2)]
    assert torch.equal(fits[0].codes, fits[1].codes)
    assert torch.equal(fits[0].scales, fits[1].scales)


@pytest.mark.parametrize("scheme", ["w2g16", "w4g32s"])
@pytest.mark.parametrize("case", ["zero weight", "zero row", "dead input", "one token"])
def test_degenerate_layers_stay_finite(scheme: str, case: str) -> None:
    weight, moment = problem(out=16, in_features=32)
    if case == "zero weight":
        weight.zero_()
    elif case == "zero row":
        weight[3].zero_()
    elif case == "dead input":
        moment[5], moment[:, 5] = 0, 0
    else:
        moment = torch.outer(moment[0], moment[0])
    form = GridScheme.parse(scheme)
    fit = fit_grid(weight, moment, form, SETTINGS).result(torch.float16)
    decoded = module(fit, form).dequantize()
    assert bool(torch.isfinite(decoded).all())
    if case == "zero weight":
        assert not decoded.any()


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot fit scheme w4g64 to a 48 x 96 layer"):
        fit_grid(*problem(in_features=96), GridScheme(4, 64), SETTINGS).result(torch.float32)


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_and_bias_train_and_codes_do_not(symmetric: bool) -> None:
    weight, moment = problem()
    form = GridScheme(3, 16, symmetric)
    fit = fit_grid(weight, moment, form, SETTINGS).result(torch.float32)
    linear = GridLinear(64, 48, form, bias=True)
    state = {"codes": fit.codes, "scales": fit.scales, "zeros": fit.zeros, "bias": torch.ones(48)}
    linear.load_state_dict({name: t for name, t in state.items() if t is not None})
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    output = linear(x)
    assert torch.allclose(output, x @ linear.dequantize().T + 1)
    output.square().sum().backward()
    trained = {name for name, p in linear.named_parameters() if p.requires_grad}
    assert trained == {"scales", "bias"}
    assert linear.scales.grad is not None and bool(linear.scales.grad.any())


@pytest.mark.parametrize("scheme", ["w4g32", "w3g64s"])
def test_a_tuned_folder_runs_in_transformers_without_us(tmp_path: Path, scheme: str) -> None:
    from transformers import AutoModelForCausalLM

    dense = dense_folder(tmp_path / "dense", "qwen2")
    recipe = replace(QUICK, scheme=scheme)
    checkpoint = tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe), silent)
    assert isinstance(checkpoint, GridCheckpoint)
    checkpoint.verify()
    assert describe(checkpoint)["scheme"] == scheme
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        original, tuned = dense(tokens).logits, model(tokens).logits
    agreement = torch.nn.functional.cosine_similarity(original, tuned, dim=-1).mean()
    assert agreement > 0.95  # unrelated models agree to about 0


def test_a_grid_run_repeats_itself(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama-tied")
    recipe = replace(QUICK, scheme="w2g64")
    for name in ("a", "b"):
        tune(TuneJob(str(tmp_path / "dense"), tmp_path / name, recipe), silent)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
