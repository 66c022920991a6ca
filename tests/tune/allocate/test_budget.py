"""Bits of the whole file: said before it is written, and never fewer than it has."""

from pathlib import Path

import pytest
import torch

from pvrt.errors import RunError
from pvrt.format.grid import open_checkpoint
from pvrt_tune.allocate.budget import FileBudget
from pvrt_tune.allocate.stage import planned_schemes
from pvrt_tune.allocate.units import find_units
from pvrt_tune.data.source_model import load_skeleton
from pvrt_tune.model_blocks import find_blocks
from pvrt_tune.settings import Recipe
from tests.fixtures.toy import toy_model, write_toy


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma3_text", "qwen2"])
def test_a_written_file_has_the_bits_that_were_said(tmp_path: Path, architecture: str) -> None:
    toy_model(architecture).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = load_skeleton(str(tmp_path / "dense"))
    blocks, recipe = find_blocks(model), Recipe(bits=6.0, embeddings="2x8g4")
    units = find_units(model, blocks, recipe)
    budget = FileBudget.of(model, units)
    schemes = planned_schemes(units, budget, 6.0)
    write_toy(
        tmp_path / "out",
        architecture,
        "2x8g8",
        dtype=torch.bfloat16,
        embeddings="2x8g4",
        schemes={unit.key: str(schemes[unit.key]) for unit in units if unit.block is not None},
    )
    written = open_checkpoint(tmp_path / "out")
    said = budget.file_bits(schemes, units)
    assert said - 8 * 24 * 3 * len(written.tensors) < 8 * written.file_bytes() <= said
    assert written.file_bits_per_weight() <= 6.0


def test_kept_embeddings_are_no_units_and_a_scheme_of_theirs_is_fixed() -> None:
    with torch.device("meta"):
        model = toy_model("llama")
    blocks = find_blocks(model)
    inside = find_units(model, blocks, Recipe(bits=4.0, embeddings="keep"))
    assert all(unit.block is not None for unit in inside)
    fixed = find_units(model, blocks, Recipe(bits=4.0, embeddings="2x8g4"))
    ends = [unit for unit in fixed if unit.block is None]
    assert [str(scheme) for unit in ends for scheme in unit.schemes] == ["2x8g4", "2x8g4"]
    assert {unit.key for unit in ends} == {"model.embed_tokens", "lm_head"}


def test_bits_beyond_the_largest_schemes_are_refused() -> None:
    with torch.device("meta"):
        model = toy_model("llama").to(torch.bfloat16)
    units = find_units(model, find_blocks(model), Recipe(bits=8.0, embeddings="keep"))
    budget = FileBudget.of(model, units)
    costs = [{scheme: 1.0 for scheme in unit.schemes} for unit in units]
    with pytest.raises(RunError, match="in the largest") as refused:
        budget.allocate(units, costs, 40.0)
    most = float(str(refused.value).split("in the largest ")[1].split(";")[0])
    assert budget.allocate(units, costs, most)
