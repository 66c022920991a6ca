"""PV-Tuning of a finished checkpoint: `pvrt tune CHECKPOINT --from ORIGINAL`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pvrt
from pvrt.cli import app
from pvrt.errors import RunError
from pvrt.format.grid import open_checkpoint
from pvrt_tune.data.text import Windows, from_text
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import FinetuneSettings, PVSettings, Recipe, TrainSettings, TuneJob
from tests.fixtures.toy import toy_tokenizer
from tests.tune.test_pipeline import QUICK, dense_folder, silent

LOOP = TrainSettings(windows=8, steps=16, batch=4, held_out=4, evaluate_every=4)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    dense_folder(folder / "llama", "llama-tied", torch.bfloat16)
    (folder / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(4096)))
    return folder


def made(dense: Path, out: Path, recipe: Recipe, start: Path | None = None) -> Path:
    job = TuneJob(str(dense / "llama"), out, recipe, str(dense / "text.txt"), start=start)
    tune(job, silent)
    return out


def kl(dense: Path, folder: Path) -> float:
    """Of a checkpoint to the original, on the text that trains."""
    tokens = from_text(str(dense / "text.txt"), toy_tokenizer(), Windows(8, 32, 0)).tokens
    models = [pvrt.load(dense / "llama"), pvrt.load(folder, dense=True)]
    with torch.inference_mode():
        first, second = (model(tokens).logits.float().log_softmax(-1) for model in models)
    return float((first.exp() * (first - second)).sum(-1).mean())


@pytest.mark.parametrize(
    ("scheme", "embeddings", "rate"),
    [("1x4g8", "2x4g8", 1e-2), ("1x4g8", "keep", 1e-2), ("w2g64", "keep", 1e-3)],
)
def test_it_goes_on_from_the_codes_of_a_checkpoint(
    dense: Path, tmp_path: Path, scheme: str, embeddings: Any, rate: float
) -> None:
    recipe = replace(QUICK, scheme=scheme, embeddings=embeddings, pv=PVSettings(learning_rate=rate))
    recipe = replace(recipe, finetune=FinetuneSettings(epochs=0))  # leaves something to do
    first = made(dense, tmp_path / "first", recipe)
    made(dense, tmp_path / "second", replace(recipe, training=LOOP), first)
    before, after = open_checkpoint(first), open_checkpoint(tmp_path / "second")
    assert before.config == after.config
    assert {name: layer.scheme for name, layer in before.layers.items()} == {
        name: layer.scheme for name, layer in after.layers.items()
    }
    assert kl(dense, tmp_path / "second") < kl(dense, first)


def test_without_a_step_it_is_the_checkpoint_itself(dense: Path, tmp_path: Path) -> None:
    """Whoever made it: its norms are not the original's here."""
    first = made(dense, tmp_path / "first", replace(QUICK, embeddings="2x4g8"))
    file = first / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = 1.5 * tensors["model.norm.weight"]
    tensors["model.layers.0.input_layernorm.weight"] *= 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    training = replace(LOOP, steps=1)
    still = replace(QUICK.pv, strategy="continuous", learning_rate=0.0)
    recipe = replace(QUICK, embeddings="2x4g8", training=training, pv=still)
    made(dense, tmp_path / "second", recipe, first)
    after = load_file(tmp_path / "second" / "model.safetensors")
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)


def test_the_command_line_tunes_a_checkpoint_on(dense: Path, tmp_path: Path) -> None:
    first = made(dense, tmp_path / "first", QUICK)
    config = tmp_path / "r.yaml"
    config.write_text("length: 32\ntraining: {windows: 8, steps: 4, batch: 2, held_out: 4}\n")
    text = ["--data", str(dense / "text.txt"), "--config", str(config), "--no-report"]
    begin = [str(first), "--from", str(dense / "llama")]
    done = CliRunner().invoke(app, ["tune", *begin, "-o", str(tmp_path / "second"), *text])
    assert done.exit_code == 0, done.output
    assert "PV step 4/4" in done.output
    assert "block 1/" not in done.output
    plan = CliRunner().invoke(app, ["plan", *begin, *text[:4]])
    assert plan.exit_code == 0, plan.output
    assert "PV-Tuning" in plan.output and "layer fit" not in plan.output


@pytest.mark.parametrize(
    "option", [["--scheme", "2x8g8"], ["--bits", "3"], ["--keep-embeddings"], ["--no-pv"]]
)
def test_options_that_a_checkpoint_decides_are_refused(
    dense: Path, tmp_path: Path, option: list[str]
) -> None:
    begin = [str(tmp_path), "--from", str(dense / "llama"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["tune", *begin, *option])
    assert isinstance(done.exception, RunError)
    assert f"leave {option[0]} out" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_checkpoint_of_another_model_is_refused(
    dense: Path, tmp_path: Path, architecture: str
) -> None:
    first = made(dense, tmp_path / "first", QUICK)
    dense_folder(tmp_path / "other", architecture, torch.bfloat16)
    job = TuneJob(
        str(tmp_path / "other"),
        tmp_path / "second",
        replace(QUICK, training=LOOP),
        str(dense / "text.txt"),
        start=first,
    )
    with pytest.raises(RunError, match=r"was not made of .*; give its own original"):
        tune(job, silent)
