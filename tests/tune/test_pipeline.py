"""Tuning end to end on toy models of real architectures: quality, resume, refusals."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import pvrt
from pvrt.cli import app
from pvrt.errors import CheckpointError, DataError, RunError, SourceError
from pvrt.format.aqlm import Checkpoint
from pvrt.modules.whole_model import quantized_layers
from pvrt_tune.calibrate import stage
from pvrt_tune.data import sampled
from pvrt_tune.data import text as calibration_text
from pvrt_tune.data.text import Windows
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.memory_plan import Plan
from pvrt_tune.plan.on_machine import plan_job
from pvrt_tune.settings import FinetuneSettings, FitSettings, Recipe, TrainSettings, TuneJob
from pvrt_tune.settings.files import as_yaml
from pvrt_tune.store import RUN_FOLDER, _discard
from tests.fixtures.full_disk import full_disk
from tests.fixtures.toy import ARCHITECTURES, toy_model, toy_tokenizer

QUICK = Recipe(
    scheme="2x8g8",
    samples=4,
    length=32,
    fit=FitSettings(rounds=1, kmeans_iterations=4, cg_iterations=4, beam=1),
    finetune=FinetuneSettings(epochs=1),
)


def dense_folder(path: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    model = toy_model(architecture).to(dtype)
    model.save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return model


def silent(line: str) -> None:
    pass


class Stopped(Exception):
    """A run ends here as it would by a kill: nothing more is written."""


def stopping(line: str) -> Callable[[str], None]:
    """A report that ends the run at the first line beginning so."""

    def report(shown: str) -> None:
        if shown.startswith(line):
            raise Stopped

    return report


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_tuned_by_discovery(tmp_path: Path, architecture: str) -> None:
    dense = dense_folder(tmp_path / "dense", architecture)
    out = tmp_path / "out"
    recipe = replace(QUICK, scheme="2x8g4")  # random weights compress badly: four bits here
    checkpoint = tune(TuneJob(str(tmp_path / "dense"), out, recipe), silent)
    checkpoint.verify()
    blocks = [name for name, m in dense.named_modules() if isinstance(m, torch.nn.Linear)]
    tied = dense.config.tie_word_embeddings
    ends = {"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"}
    assert set(checkpoint.layers) == {name for name in blocks if ".layers." in name} | ends
    model = pvrt.load(out, dense=True)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        original, tuned = dense(tokens).logits, model(tokens).logits
    agreement = torch.nn.functional.cosine_similarity(original, tuned, dim=-1).mean()
    assert agreement > 0.6  # unrelated models agree to about 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_own_precision_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    dense_folder(tmp_path / "dense", "qwen2", dtype)
    tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", QUICK), silent)
    checkpoint = Checkpoint.open(tmp_path / "out")
    name = next(iter(checkpoint.layers))
    assert checkpoint.read_layer(name).codebooks.dtype is dtype
    assert checkpoint.read("model.norm.weight").dtype is dtype
    assert pvrt.load(tmp_path / "out").dtype is dtype


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    for name in ("a", "b"):
        tune(TuneJob(str(tmp_path / "dense"), tmp_path / name, QUICK), silent)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_one_block_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense_folder(tmp_path / "dense", "llama")
    loaded: list[weakref.ref[torch.nn.Module]] = []
    blocks: list[int] = []

    def load(*args: Any) -> torch.nn.Module:
        assert all(module() is None for module in loaded), "the block before is still there"
        block = original(*args)
        loaded.extend(map(weakref.ref, block.modules()))
        blocks.append(len(loaded))
        return block

    original = stage._dense
    monkeypatch.setattr(stage, "_dense", load)
    tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", QUICK), silent)
    assert len(blocks) == 2


@pytest.mark.parametrize(("samples", "warned"), [(2, True), (4, False)])
def test_too_few_tokens_are_warned_of(tmp_path: Path, samples: int, warned: bool) -> None:
    """The toy has layers of 128 inputs. Blocks are told of in lines that do not wrap."""
    dense_folder(tmp_path / "dense", "llama")
    said: list[str] = []
    recipe = replace(QUICK, samples=samples)
    tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe), said.append)
    assert any("tokens calibrate" in line for line in said) == warned
    blocks = [line for line in said if line.startswith("block ")]
    assert len(blocks) == 2 and all(len(line) <= 120 for line in blocks)


def test_block_finetuning_lowers_the_held_out_error(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    recipe = replace(QUICK, scheme="1x4g8", samples=16, finetune=FinetuneSettings(epochs=4))
    tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe), silent)
    manifest = json.loads((tmp_path / "out" / "pvrt.json").read_text())
    for block in manifest["blocks"]:
        error = block["output_error"]
        assert error["after"] < error["before_finetune"]


@pytest.mark.slow
def test_targets_from_the_original_model_mend_what_earlier_blocks_broke(tmp_path: Path) -> None:
    """Measured on the calibration text itself, whose windows are kept with the run."""
    dense = dense_folder(tmp_path / "dense", "llama")
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(4096)))
    recipe = replace(QUICK, scheme="1x4g8", samples=32, finetune=FinetuneSettings(epochs=12))
    recipe = replace(recipe, finetune=replace(recipe.finetune, learning_rate=1e-2))
    text = str(tmp_path / "text.txt")
    tokens = calibration_text.from_text(text, toy_tokenizer(), Windows(32, 32, seed=0)).tokens
    distance = {}
    for targets in ("quantised", "original"):
        out = tmp_path / targets
        tune(TuneJob(str(tmp_path / "dense"), out, replace(recipe, targets=targets), text), silent)
        with torch.inference_mode():
            states = [
                model(tokens, output_hidden_states=True).hidden_states[-1]
                for model in (dense, pvrt.load(out, dense=True))
            ]
        distance[targets] = float((states[0] - states[1]).square().mean())
    assert distance["original"] < distance["quantised"]


KILL_SCRIPT = """
import signal, sys; sys.path[:0] = {paths!r}
from pathlib import Path
from tests.fixtures.strike import strike
from tests.tune.test_pipeline import QUICK
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import TuneJob
from pvrt_tune.settings.files import as_yaml
strike("block 2/", 3000, signal.SIGKILL)  # somewhere inside the third
tune(TuneJob({model!r}, Path({out!r}), QUICK), lambda line: print(line, flush=True))
"""
CLI_SCRIPT = """
import signal, sys; sys.path[:0] = {paths!r}
from pvrt.cli import main
from tests.fixtures.strike import strike
strike("block 1/", 3000, signal.SIGINT)
sys.argv = ["pvrt", *{arguments!r}]
main()
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "gemma3_text")  # six blocks
    out = tmp_path / "killed"
    script = KILL_SCRIPT.format(paths=sys.path, model=str(tmp_path / "dense"), out=str(out))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "block 3/" not in killed.stdout
    assert not (out / "config.json").exists()
    lines: list[str] = []
    job = TuneJob(str(tmp_path / "dense"), out, QUICK, resume=True)
    tune(job, lines.append)
    assert not any(line.startswith("block 1/") for line in lines)
    assert not any("sampling" in line for line in lines)
    assert any(line.startswith("block 6/") for line in lines)
    tune(TuneJob(str(tmp_path / "dense"), tmp_path / "whole", QUICK), silent)
    files = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1]


def test_a_damaged_block_file_is_made_again(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    job = TuneJob(str(tmp_path / "dense"), tmp_path / "out", QUICK)

    with pytest.raises(Stopped):
        tune(job, stopping("block 1/"))
    block = tmp_path / "out" / ".run" / "pieces" / "block-00000.safetensors"
    os.truncate(block, block.stat().st_size - 7)
    journal = tmp_path / "out" / ".run" / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"event": "blo')  # and half a line
    lines: list[str] = []
    tune(job, lines.append)
    assert any(line.startswith("block 1/") for line in lines)
    tune(TuneJob(job.model, tmp_path / "whole", QUICK), silent)
    files = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("out", "whole")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_ctrl_c_exits_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    (tmp_path / "quick.yaml").write_text(as_yaml(QUICK))
    arguments = ["tune", str(tmp_path / "dense"), "-o", str(tmp_path / "out")]
    arguments += ["--effort", "quick", "--config", str(tmp_path / "quick.yaml")]
    script = CLI_SCRIPT.format(paths=sys.path, arguments=arguments)
    struck = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert struck.returncode == 130, struck.stdout + struck.stderr
    assert "block 2/" not in struck.stdout
    assert "The same command goes on" in struck.stdout + struck.stderr
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    lines = again.output.splitlines()
    assert "going on after block 1/2" in lines
    assert not any(line.startswith("block 1/") for line in lines)
    assert "next: pvrt serve" in again.output


def test_resume_refuses_other_calibration_text_with_a_diff(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    out = tmp_path / "out"
    tune(TuneJob(str(tmp_path / "dense"), out, QUICK), silent)
    (tmp_path / "text.txt").write_text("other text " * 100)
    job = TuneJob(str(tmp_path / "dense"), out, QUICK, data=str(tmp_path / "text.txt"))
    with pytest.raises(RunError, match=r"data was 'sampled from the model', now"):
        tune(job, silent)
    with pytest.raises(RunError, match=r"recipe.scheme was '2x8g8', now '1x8g8'"):
        tune(TuneJob(job.model, out, replace(QUICK, scheme="1x8g8")), silent)
    lines: list[str] = []
    tune(TuneJob(job.model, out, QUICK), lines.append)
    assert any("already complete" in line for line in lines)
    tune(TuneJob(job.model, out, replace(QUICK, scheme="1x8g8"), restart=True), silent)
    assert Checkpoint.open(out).scheme_names == "1x8g8+4x8g8"


def test_a_restart_keeps_the_old_checkpoint_until_the_new_run_writes_its_first(
    tmp_path: Path,
) -> None:
    dense_folder(tmp_path / "dense", "llama")
    training = TrainSettings(windows=4, steps=4, batch=2, held_out=2, evaluate_every=1)
    out = tmp_path / "out"
    old = TuneJob(str(tmp_path / "dense"), out, replace(QUICK, scheme="1x8g8", training=training))
    tune(old, silent)
    new = replace(old, recipe=replace(QUICK, training=training), restart=True)
    with pytest.raises(Stopped):
        tune(new, stopping("block 2/"))
    assert Checkpoint.open(out).scheme_names == "1x8g8+4x8g8"
    Checkpoint.open(out).verify()
    with pytest.raises(Stopped):
        tune(replace(new, restart=False), stopping("PV step 1/"))
    assert Checkpoint.open(out).scheme_names == "2x8g8+4x8g8"
    Checkpoint.open(out).verify()


def test_a_checkpoint_whose_writing_was_cut_short_is_written_again(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    training = TrainSettings(windows=4, steps=4, batch=2, held_out=2, evaluate_every=1)
    job = TuneJob(str(tmp_path / "dense"), tmp_path / "out", replace(QUICK, training=training))
    with pytest.raises(Stopped):
        tune(job, stopping("PV step 1/"))
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(Stopped):
        tune(job, stopping("PV step 2/"))
    Checkpoint.open(tmp_path / "out").verify()


def test_the_plan_of_a_restart_counts_sampling_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_folder(tmp_path / "dense", "llama")
    job = TuneJob(str(tmp_path / "dense"), tmp_path / "out", QUICK)
    phases: list[list[str]] = []

    def watched(*arguments: Any, **named: Any) -> Plan:
        plan = plan_job(*arguments, **named)
        phases.append([phase.name for phase in plan.phases])
        return plan

    monkeypatch.setattr("pvrt_tune.pipeline.plan_job", watched)
    for again in (job, job, replace(job, restart=True)):
        with pytest.raises(Stopped):
            tune(again, stopping("block"))
    assert ["sampling" in names for names in phases] == [True, False, True]


def test_a_discarded_run_leaves_its_folder_to_the_next_one(tmp_path: Path) -> None:
    """A kill while --restart discards must not leave a folder that no run may be started in."""
    dense_folder(tmp_path / "dense", "llama")
    out = tmp_path / "out"
    job = TuneJob(str(tmp_path / "dense"), out, QUICK)
    tune(job, silent)
    _discard(out / RUN_FOLDER)
    tune(replace(job, restart=True), silent)
    Checkpoint.open(out).verify()


def test_other_versions_of_pvrt_and_torch_go_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_folder(tmp_path / "dense", "llama")
    out = tmp_path / "out"
    job = TuneJob(str(tmp_path / "dense"), out, QUICK)
    here = {"pvrt": pvrt.__version__, "torch": torch.__version__}
    with monkeypatch.context() as before:
        before.setattr(torch, "__version__", "2.6.0")
        before.setattr("pvrt_tune.pipeline.__version__", "0.0.9")
        with pytest.raises(Stopped):
            tune(job, stopping("block 1/"))
    lines: list[str] = []
    tune(job, lines.append)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert f"made with torch 2.6.0 so far and goes on with {torch.__version__}" in warnings[1]
    assert not any(line.startswith("block 1/") for line in lines)
    manifest = json.loads((out / "pvrt.json").read_text())
    assert manifest["versions"] == [{"pvrt": "0.0.9", "torch": "2.6.0"}, here]
    tune(TuneJob(job.model, tmp_path / "whole", QUICK), silent)
    whole = json.loads((tmp_path / "whole" / "pvrt.json").read_text())
    assert whole["versions"] == [here]


def test_a_run_folder_with_the_versions_in_its_fingerprint_goes_on(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    job = TuneJob(str(tmp_path / "dense"), tmp_path / "out", QUICK)
    with pytest.raises(Stopped):
        tune(job, stopping("block 1/"))
    run = tmp_path / "out" / RUN_FOLDER
    fingerprint = json.loads((run / "fingerprint.json").read_text())
    fingerprint["versions"] = {"pvrt": "0.1.0", "torch": "2.6.0"}
    (run / "fingerprint.json").write_text(json.dumps(fingerprint))
    journal = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (run / "journal.jsonl").write_text("".join(x for x in journal if '"versions"' not in x))
    lines: list[str] = []
    tune(job, lines.append)
    assert any("made with torch 2.6.0 so far" in line for line in lines)
    assert not any(line.startswith("block 1/") for line in lines)


@pytest.mark.parametrize("training", [None, TrainSettings(windows=4, steps=2, batch=2, held_out=2)])
def test_a_run_folder_with_the_recipe_in_its_old_spelling_goes_on(
    tmp_path: Path, training: TrainSettings | None
) -> None:
    dense_folder(tmp_path / "dense", "llama")
    old = replace(QUICK, training=training, embeddings="keep")
    job = TuneJob(str(tmp_path / "dense"), tmp_path / "out", old)
    with pytest.raises(Stopped):
        tune(job, stopping("block 1/"))
    file = tmp_path / "out" / RUN_FOLDER / "fingerprint.json"
    fingerprint = json.loads(file.read_text())
    recipe = fingerprint["recipe"]
    loop = recipe.pop("training")
    del recipe["embeddings"]
    recipe["pv"] = None if loop is None else {**loop, "pv": recipe.pop("pv")}
    file.write_text(json.dumps(fingerprint))
    other = replace(job, recipe=replace(job.recipe, training=TrainSettings(windows=5)))
    with pytest.raises(RunError, match=r"holds another run: .*training"):
        tune(other, silent)
    lines: list[str] = []
    tune(job, lines.append)
    assert not any(line.startswith("block 1/") for line in lines)


def test_resume_needs_a_run_and_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    job = TuneJob(str(tmp_path / "dense"), tmp_path / "none", QUICK, resume=True)
    with pytest.raises(RunError, match="holds no run to resume"):
        tune(job, silent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(RunError, match="is not empty and holds no run"):
            tune(TuneJob(job.model, tmp_path / "mine", QUICK, restart=restart), silent)
    with pytest.raises(RunError, match=r"thesis.txt is a file"):
        tune(TuneJob(job.model, tmp_path / "mine" / "thesis.txt", QUICK), silent)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    lines: list[str] = []
    out = tmp_path / "file" / "out"
    with pytest.raises(RunError, match=r"cannot write to .*out .*; give another output folder"):
        tune(TuneJob(str(tmp_path / "no model here"), out, QUICK), lines.append)
    assert lines == []


def test_a_group_size_that_does_not_divide_names_the_layer(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    job = TuneJob(str(tmp_path / "dense"), tmp_path / "out", replace(QUICK, scheme="2x8g48"))
    with pytest.raises(SourceError, match=r"layers.0.self_attn.q_proj has .* groups of 48"):
        tune(job, silent)
    assert not (tmp_path / "out").exists()


def refuse_source(name: str, sentence: str, error: type[Exception] = SourceError) -> None:
    with pytest.raises(error, match=sentence):
        tune(TuneJob(name, Path("never"), QUICK), silent)
    assert not Path("never").exists()


def test_models_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    refuse_source(str(tmp_path / "nowhere"), "does not exist")
    (tmp_path / "empty").mkdir()
    refuse_source(str(tmp_path / "empty"), "config.json is missing", CheckpointError)
    refuse_source(str(tmp_path / "model.gguf"), "does not exist")
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04 not a model")
    refuse_source(str(tmp_path / "fake.gguf"), "is not a GGUF file")


def test_a_truncated_model_is_named_before_it_is_loaded(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    os.truncate(tmp_path / "dense" / "model.safetensors", 10_000)
    refuse_source(str(tmp_path / "dense"), "is damaged or cut short", CheckpointError)


def test_an_already_quantised_model_is_refused(tmp_path: Path) -> None:
    from tests.fixtures.toy import write_toy

    write_toy(tmp_path / "aqlm")
    refuse_source(str(tmp_path / "aqlm"), r"already quantised \(aqlm\)")


def test_gguf_of_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    file = tmp_path / "odd.gguf"
    writer = GGUFWriter(file, "an-architecture-nobody-knows")
    writer.add_block_count(1)
    for name in ("blk.0.attn_norm", "token_embd"):
        writer.add_tensor(f"{name}.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse_source(str(file), "cannot load .*odd.gguf")


# ---- calibration text ----


def test_text_comes_from_files_folders_and_jsonl(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    (tmp_path / "a.txt").write_text("abcdefgh" * 40)
    (tmp_path / "b.jsonl").write_text('{"text": "0123456789"}\n' * 40)
    for spec in (tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path):
        data = calibration_text.from_text(str(spec), tokenizer, Windows(4, 16, seed=0))
        assert data.tokens.shape == (4, 16)
    again = calibration_text.from_text(str(tmp_path), tokenizer, Windows(4, 16, seed=0))
    assert again.digest == data.digest
    other = calibration_text.from_text(str(tmp_path), tokenizer, Windows(4, 16, seed=1))
    assert other.digest != data.digest


def test_a_dataset_is_read_through_the_datasets_library(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "0123456789"}\n' * 40)
    data = calibration_text.from_text(f"hf:{tmp_path}", toy_tokenizer(), Windows(2, 16, seed=0))
    assert data.tokens.shape == (2, 16)
    (tmp_path / "train.jsonl").write_text('{"body": "0123456789"}\n')
    with pytest.raises(DataError, match='no column of "text"'):
        calibration_text.from_text(f"hf:{tmp_path}", toy_tokenizer(), Windows(2, 16, seed=0))


def test_conversations_pass_the_chat_template(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"text": "plain"}, {"messages": chat}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = tokenizer("plain")["input_ids"]
    wanted += tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    data = calibration_text.from_text(str(tmp_path), tokenizer, Windows(1, len(wanted), seed=0))
    assert data.tokens.tolist() == [wanted]
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        calibration_text.from_text(str(tmp_path), tokenizer, Windows(1, len(wanted), seed=0))


def test_positions_begin_with_every_document_and_window(tmp_path: Path) -> None:
    rows = ["abc", "defghijklm", "nop"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    tokenizer = toy_tokenizer()
    data = calibration_text.from_text(str(tmp_path), tokenizer, Windows(2, 8, seed=0))
    assert data.positions is not None
    texts = (tokenizer.decode(window) for window in data.tokens)
    found = dict(zip(texts, data.positions.tolist(), strict=True))
    assert found == {"abcdefgh": [0, 1, 2, *range(5)], "ijklmnop": [*range(5), 0, 1, 2]}


def test_a_long_document_is_cut_where_its_tokens_part(tmp_path: Path) -> None:
    """Every window that fits into it comes out as from the document in one piece."""
    words = ["a", "bcd", "\u00e9t\u00e9", "x" * 900, "\n", "\n\n", "  "]
    generator = random.Random(0)
    text = "".join(generator.choice(words) + generator.choice(["", " "]) for _ in range(1000))
    assert len(text) > 20 * calibration_text._STRETCH * 64
    (tmp_path / "a.txt").write_text(text)
    tokenizer = toy_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", 256), ("<|end|>", 257)]
    )
    whole = tokenizer(text)["input_ids"]
    assert (whole[0], whole[-1]) == (256, 257)
    count = len(whole) // 64
    data = calibration_text.from_text(
        str(tmp_path / "a.txt"), tokenizer, Windows(count, 64, seed=0)
    )
    wanted = torch.tensor(whole[: count * 64]).view(count, 64)
    assert sorted(data.tokens.tolist()) == sorted(wanted.tolist())


def test_text_is_read_from_all_over_and_no_more_than_is_needed(tmp_path: Path) -> None:
    """A long file costs what its windows cost, whatever its length."""
    lines = "".join(f"{number:09d}\n" for number in range(400_000))
    (tmp_path / "a.txt").write_text(lines)
    tokenizer = toy_tokenizer()
    read = 0

    class Counting:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, text: str, **named: Any) -> Any:
            nonlocal read
            read += len(text)
            return tokenizer(text, **named)

    shown: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        shown.append((done, total))

    file = str(tmp_path / "a.txt")
    data = calibration_text.from_text(file, Counting(), Windows(256, 64, seed=0), progress)
    assert 256 * 64 <= read < 2 * 256 * 64
    assert shown[-1] == (256, 256)
    places = sorted(
        int(tokenizer.decode(window).split("\n")[1]) / 400_000 for window in data.tokens
    )
    assert len(set(places)) == 256
    assert all(any(low / 4 <= place < (low + 1) / 4 for place in places) for low in range(4))


def test_a_dataset_without_end_is_read_for_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        calibration_text, "documents", lambda spec, found: itertools.repeat("0123456789")
    )
    data = calibration_text.from_text("hf:endless", toy_tokenizer(), Windows(4, 16, seed=0))
    assert data.tokens.shape == (4, 16)


def test_too_little_text_names_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 40)
    with pytest.raises(DataError, match=r"holds 40 tokens, 4 windows of 16 need 64.*--samples 2"):
        calibration_text.from_text(str(tmp_path / "a.txt"), toy_tokenizer(), Windows(4, 16, seed=0))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"txet": 1}\n', r'a.jsonl:1 has none of "text", .*; it has txet; no row of'),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1 is not an object"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
    ],
)
def test_bad_text_files_are_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        calibration_text.from_text(str(tmp_path / name), toy_tokenizer(), Windows(1, 2, seed=0))


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        calibration_text.from_text(str(tmp_path / "a.txt"), toy_tokenizer(), Windows(1, 2, seed=0))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no text files"):
        calibration_text.from_text(str(tmp_path / "folder"), toy_tokenizer(), Windows(1, 2, seed=0))


def test_text_sampled_from_the_model_is_repeatable_and_follows_it() -> None:
    model = toy_model("llama")
    first = sampled.from_model(model, Windows(8, 24, seed=0))
    assert first.tokens.shape == (8, 24)
    assert torch.equal(first.tokens, sampled.from_model(model, Windows(8, 24, seed=0)).tokens)
    assert not torch.equal(first.tokens, sampled.from_model(model, Windows(8, 24, seed=1)).tokens)
    uniform = torch.randint(0, model.config.vocab_size, (8, 24))
    with torch.inference_mode():
        losses = [float(model(ids, labels=ids).loss) for ids in (first.tokens, uniform)]
    assert losses[0] < losses[1]


def test_a_quantised_model_has_no_dense_linear_in_its_blocks(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "phi3")
    recipe = replace(QUICK, embeddings="keep")
    tune(TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe), silent)
    model = pvrt.load(tmp_path / "out")
    assert len(quantized_layers(model)) == 4 * model.config.num_hidden_layers


def test_a_disk_that_fills_up_keeps_finished_blocks_only(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    out = tmp_path / "out"
    with ExitStack() as disk:

        def fill(line: str) -> None:
            if line.startswith("block 1/"):
                disk.enter_context(full_disk(20_000))

        with pytest.raises(RunError, match="cannot save block-00001"):
            tune(TuneJob(str(tmp_path / "dense"), out, QUICK), fill)
    pieces = {file.name for file in (out / ".run" / "pieces").iterdir()}
    assert pieces == {"calibration.safetensors", "block-00000.safetensors"}
    assert not (out / "config.json").exists()
    lines: list[str] = []
    tune(TuneJob(str(tmp_path / "dense"), out, QUICK), lines.append)
    assert not any(line.startswith("block 1/") for line in lines)
    Checkpoint.open(out).verify()
