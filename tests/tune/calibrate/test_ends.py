"""Embedding and output head in codes: which ones can be, what they are fitted for, what moves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pvrt.errors import RunError
from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize
from pvrt_tune.calibrate.ends import ends, schemes_of_ends
from pvrt_tune.data.activations import Activations
from pvrt_tune.fit import table
from pvrt_tune.fit.table import fit_table
from pvrt_tune.model_blocks import find_blocks
from pvrt_tune.model_calls import head_inputs
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import (
    FinetuneSettings,
    FitSettings,
    PVSettings,
    Recipe,
    TrainSettings,
    TuneJob,
)
from pvrt_tune.store import RUN_FOLDER
from tests.fixtures.toy import ARCHITECTURES, toy_model, toy_tokenizer

QUICK = Recipe(
    samples=4,
    length=32,
    fit=FitSettings(rounds=1, kmeans_iterations=4, cg_iterations=4, beam=1),
    finetune=FinetuneSettings(epochs=1),
)


def dense_folder(path: Path, architecture: str) -> Any:
    model = toy_model(architecture)
    model.save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tied_table_is_one_end_and_makes_logits(architecture: str) -> None:
    model = toy_model(architecture)
    found = {name: end.multiplies for name, end in ends(model).items()}
    tied = model.config.tie_word_embeddings
    expected = {"model.embed_tokens": True}
    assert found == (expected if tied else {"model.embed_tokens": False, "lm_head": True})


class Normed(nn.Embedding):
    """Does something of its own with the rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(input))


def test_what_codes_cannot_stand_for_stays_dense() -> None:
    model = toy_model("llama")
    model.model.embed_tokens = Normed(*model.model.embed_tokens.weight.shape)
    assert set(ends(model)) == {"lm_head"}
    assert schemes_of_ends(model, replace(QUICK, scheme="w4g32")) == {}
    assert schemes_of_ends(model, replace(QUICK, embeddings="keep")) == {}
    with pytest.raises(RunError, match="codes of 1x16g8 do not make lm_head of 384 x 128 smaller"):
        schemes_of_ends(model, replace(QUICK, embeddings="1x16g8"))
    assert schemes_of_ends(model, QUICK) == {"lm_head": Scheme.parse("4x8g8")}


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
def test_what_enters_the_head_follows_from_the_last_blocks_outputs(architecture: str) -> None:
    model, tokens = toy_model(architecture), torch.randint(0, 256, (4, 12))
    blocks, seen = find_blocks(model), []
    last: list[torch.Tensor] = []
    hooks = [
        model.get_output_embeddings().register_forward_pre_hook(lambda m, x: seen.append(x[0])),
        blocks.blocks[-1].register_forward_hook(
            lambda m, x, y: last.append(y[0] if isinstance(y, tuple) else y)
        ),
    ]
    with torch.inference_mode():
        model(tokens)
    for hook in hooks:
        hook.remove()
    hidden = Activations(last[0].clone(), 2, "cpu")
    found = torch.cat(list(head_inputs(model, blocks, tokens, hidden)))
    torch.testing.assert_close(found, seen[0].flatten(0, 1))
    assert list(blocks.blocks) == list(find_blocks(model).blocks)  # as before


@pytest.mark.parametrize("scheme", ["4x8g8", "2x8g4", "5x8g8"])
def test_rows_that_codebooks_were_not_fitted_on_are_as_good(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of very different sizes cost nothing: they are scaled."""
    monkeypatch.setattr(table, "ROWS", 512)
    monkeypatch.setattr(table, "FITTED_ON", 512)
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** torch.linspace(-1, 1, 64)
    weight = torch.randn(1500, 64, generator=generator)[torch.randperm(1500)] * sizes
    recipe = replace(QUICK, scheme=scheme, fit=replace(QUICK.fit, kmeans_iterations=12))
    parts: list[tuple[int, int]] = []
    metric = torch.diag(1 / sizes**2)
    found = fit_table(weight, metric, recipe, generator, lambda *done: parts.append(done))
    assert parts == [(number, 4) for number in (1, 2, 3, 4)]
    layer = found.layer
    assert layer.in_scales is not None
    decoded = aqlm_dequantize(layer.codes, layer.codebooks, layer.scales) * layer.in_scales
    errors = ((decoded - weight) / sizes).square().mean(1)
    assert float(errors.mean()) == pytest.approx(found.relative_error, rel=0.1)
    bits = Scheme.parse(scheme).num_codebooks * 8 / Scheme.parse(scheme).in_group_size
    assert errors.mean() < 6 * 4**-bits  # 512 rows say little; unscaled columns leave 0.1
    assert errors.view(3, 500).mean(1).max() < 1.2 * errors.mean()


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_embeddings_stay_in_16_bits_if_asked(tmp_path: Path, architecture: str) -> None:
    """The layout is then the published one."""
    dense = dense_folder(tmp_path / "dense", architecture)
    recipe = replace(QUICK, embeddings="keep")
    checkpoint = tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe), lambda line: None)
    assert all(".layers." in name for name in checkpoint.layers)
    assert "model.embed_tokens.weight" in checkpoint.tensors
    assert ("lm_head.weight" in checkpoint.tensors) is not dense.config.tie_word_embeddings
    assert checkpoint.config["quantization_config"]["num_codebooks"] == 2


def test_damaged_codes_of_embeddings_stop_the_run_and_are_made_again(tmp_path: Path) -> None:
    """They are no reason to go on with tables in 16 bits."""
    dense_folder(tmp_path / "dense", "llama-tied")
    recipe = replace(QUICK, training=TrainSettings(windows=4, steps=1, batch=2, held_out=1))
    job, piece = TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe), "ends.safetensors"

    def damage(line: str) -> None:
        if "can be served from here on" in line:
            (tmp_path / "out" / RUN_FOLDER / "pieces" / piece).unlink()

    with pytest.raises(RunError, match=r"^ends in .* was damaged or removed during the run"):
        tune(job, damage)
    assert "model.embed_tokens" in tune(job, lambda line: None).layers


def test_tuning_moves_the_codebooks_of_embeddings(tmp_path: Path) -> None:
    """And scales; codes stay what calibration left."""
    dense_folder(tmp_path / "dense", "llama-tied")
    # Small steps, of which the last is better than none on any text: else the first state is kept.
    training = TrainSettings(windows=8, steps=4, batch=4, held_out=4)
    recipe = replace(QUICK, training=training, pv=PVSettings(learning_rate=2e-4))
    calibrated: dict[str, torch.Tensor] = {}

    def report(line: str) -> None:
        if "can be served from here on" in line:
            calibrated.update(load_file(tmp_path / "out" / "model.safetensors"))

    tuned = tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe), report)
    parts = [name for name in tuned.tensors if "embed_tokens" in name]
    same = {name for name in parts if torch.equal(calibrated[name], tuned.read(name))}
    assert same == {"model.embed_tokens.codes"}
