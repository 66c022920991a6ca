"""Bits of the whole file shared out over toy models of real architectures."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pvrt.errors import RunError
from pvrt.format.scheme import Scheme
from pvrt_tune.allocate.budget import FileBudget
from pvrt_tune.allocate.sensitivity import measure
from pvrt_tune.allocate.stage import allocate, planned_schemes, problem, stored_schemes
from pvrt_tune.allocate.units import find_units
from pvrt_tune.data.source_model import load_source
from pvrt_tune.data.stored_weights import StoredWeights
from pvrt_tune.data.text import CalibrationData
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.fit.table import column_sizes
from pvrt_tune.model_blocks import find_blocks
from pvrt_tune.randomness import seeded
from pvrt_tune.run import Run
from pvrt_tune.settings import EFFORTS, AllocationSettings, Recipe, TuneJob
from pvrt_tune.store import RUN_FOLDER, Store
from tests.fixtures.toy import toy_model, toy_tokenizer

ALLOCATION = AllocationSettings(windows=2, length=16)
RECIPE = Recipe(bits=6.0, samples=4, length=32, allocation=ALLOCATION)


def silent(line: str) -> None:
    pass


def run_of(
    path: Path, architecture: str, recipe: Recipe = RECIPE, report: Callable[[str], None] = silent
) -> Run:
    """A run on a toy model, which is written where it is not yet."""
    folder = path / architecture
    if not folder.exists():
        toy_model(architecture).to(torch.bfloat16).save_pretrained(folder)
        toy_tokenizer().save_pretrained(folder)
    source = load_source(str(folder))
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 256, (recipe.samples, recipe.length), generator=draw)
    store = Store(path / "out" / RUN_FOLDER)
    store.folder.mkdir(parents=True, exist_ok=True)
    job = TuneJob(str(folder), path / "out", recipe)
    data = CalibrationData(tokens, "toy")
    return Run(job, source, find_blocks(source.model), data, store, report)


def file_bits(run: Run, schemes: dict[str, Scheme]) -> float:
    """Bits per weight of the file with these schemes."""
    units = find_units(run.source.model, run.blocks, run.recipe)
    budget = FileBudget.of(run.source.model, units)
    return budget.file_bits(schemes, units) / budget.weights


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_schemes_of_all_layers_fill_the_budget(tmp_path: Path, architecture: str) -> None:
    lines: list[str] = []
    run = run_of(tmp_path, architecture, report=lines.append)
    schemes = allocate(run)
    units = find_units(run.source.model, run.blocks, run.recipe)
    assert set(schemes) == {name for unit in units for name in unit.names}
    for unit in units:
        assert len({schemes[name] for name in unit.names}) == 1
        assert all(schemes[unit.key].divides(*shape) for shape in unit.shapes)
    assert 5.9 < file_bits(run, schemes) <= 6
    assert stored_schemes(run.store) == schemes
    assert lines[-1].startswith("bits shared out by measured KL: ")


class Stopped(Exception):
    """A run ends here as it would by a kill."""


@pytest.mark.slow
def test_a_killed_measurement_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe = replace(RECIPE, samples=1)  # room for one block in a sweep
    whole = allocate(run_of(tmp_path / "whole", "llama", recipe))
    cut = run_of(tmp_path / "cut", "llama", recipe)
    save = cut.store.save

    def until_second(name: str, tensors: Mapping[str, torch.Tensor], report: Any) -> None:
        if name != "sensitivity-00000":
            raise Stopped
        save(name, tensors, report)

    cut.store.save = until_second  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        allocate(cut)
    again = run_of(tmp_path / "cut", "llama", recipe)
    assert again.store.report("sensitivity-00000") is not None
    assert stored_schemes(again.store) is None
    assert allocate(again) == whole
    first = run_of(tmp_path / "whole", "llama", recipe).store
    for piece in ("sensitivity-00000", "sensitivity-00001"):
        assert again.store.noted(piece) == first.noted(piece)


@pytest.mark.slow
def test_a_layer_that_matters_more_gets_more_bits(tmp_path: Path) -> None:
    run = run_of(tmp_path, "llama")
    loud = "model.layers.1.mlp.down_proj"
    source = run.source
    weights = source.read([f"{loud}.weight"])[f"{loud}.weight"]
    patched = dict(source._stored.weights)
    patched[source._assigned.keys[f"{loud}.weight"][0]] = weights * 6
    run = replace(run, source=replace(source, _stored=StoredWeights(patched, {})))
    schemes = allocate(run)
    units = {u.key: u for u in find_units(run.source.model, run.blocks, run.recipe)}

    def bits(name: str) -> float:
        return units[name].bits(schemes[name], 0) / units[name].weights

    assert bits(loud) > bits("model.layers.0.mlp.down_proj")


@pytest.mark.slow
def test_a_table_is_measured_as_it_is_fitted(tmp_path: Path) -> None:
    """With columns of one size."""
    run = run_of(tmp_path, "llama")
    name = "model.embed_tokens"
    weight = run.source.read([f"{name}.weight"])[f"{name}.weight"]
    weight = weight * torch.logspace(-1, 1, weight.shape[1])
    patched = dict(run.source._stored.weights)
    patched[run.source._assigned.keys[f"{name}.weight"][0]] = weight
    run = replace(run, source=replace(run.source, _stored=StoredWeights(patched, {})))
    unit = next(u for u in find_units(run.source.model, run.blocks, RECIPE) if u.key == name)
    found = measure(run, [unit])[name].errors["4x8g8"]
    sizes, scheme, quick = column_sizes(weight), Scheme.parse("4x8g8"), EFFORTS["quick"].fit
    fit = fit_layer(weight / sizes, sizes.square().diag(), scheme, quick, seeded(0, name))
    assert found == pytest.approx(fit.relative_error(), rel=0.2)  # 5 times more as it is


def test_bits_out_of_reach_are_one_sentence(tmp_path: Path) -> None:
    run = run_of(tmp_path, "llama", replace(RECIPE, bits=1.5))
    with pytest.raises(RunError, match=r"--bits 1.5 is out of reach: .* give a number between"):
        allocate(run)
    assert not run.store.events  # said before anything was measured


def test_planned_schemes_fill_the_budget_without_weights(tmp_path: Path) -> None:
    run = run_of(tmp_path, "llama-tied")
    schemes = planned_schemes(*problem(run.source.model, run.blocks, RECIPE), 6.0)
    assert "lm_head" not in schemes
    assert 5.9 < file_bits(run, schemes) <= 6
