"""Plans: what is predicted is what a run needs and gives; what does not fit is one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pvrt.cli import app
from pvrt.errors import RunError
from pvrt.format.aqlm import Checkpoint
from pvrt_tune.data.source_model import load_skeleton
from pvrt_tune.machine import Machine
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.cards import A100
from pvrt_tune.plan.choose import plan_run
from pvrt_tune.plan.memory_plan import Phase, Plan, Request
from pvrt_tune.plan.report import misfits
from pvrt_tune.plan.skeleton import model_shape
from pvrt_tune.settings import (
    EFFORTS,
    FinetuneSettings,
    FitSettings,
    Recipe,
    TrainSettings,
    TuneJob,
)
from pvrt_tune.time_limit import CALIBRATED
from tests.fixtures.shapes import LLAMA_8B, config_only
from tests.fixtures.toy import toy_model, toy_tokenizer

QUICK = Recipe(
    samples=4,
    length=32,
    fit=FitSettings(rounds=1, kmeans_iterations=2, cg_iterations=2),
    finetune=FinetuneSettings(epochs=1),
)
ROOMY = Machine(host=10**12, device=10**12, disk=10**12)


def plan_of(folder: Path, machine: Machine = ROOMY, **request: Any) -> Plan:
    asked = Request(str(folder), request.pop("recipe", Recipe()), **request)
    return plan_run(load_skeleton(str(folder)), asked, A100.speed(), machine)


@pytest.mark.parametrize("effort", ["quick", "standard", "best"])
def test_8b_fits_a_24_gb_card_and_24_gb_of_host_memory(tmp_path: Path, effort: str) -> None:
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    machine = Machine(host=24 * 10**9, device=24 * 10**9, disk=60 * 10**9)
    recipe = replace(EFFORTS[effort], training=None)
    plan = plan_of(folder, machine, recipe=recipe, device="cuda")
    assert misfits(plan, machine) == []
    assert plan.phases[0].name == "sampling"
    assert plan.parameters == 8_030_261_248
    assert plan.result.bits_per_weight_linears == pytest.approx(2.005, abs=0.001)
    tables = 2 * 128256 * 4096 * 4.005 / 8
    assert plan.result.file_bytes == pytest.approx(tables + 6.98e9 * 2.005 / 8, rel=0.01)
    kept = plan_of(folder, machine, recipe=replace(recipe, embeddings="keep"), device="cuda")
    dense = 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert kept.result.file_bytes == pytest.approx(dense + 6.98e9 * 2.005 / 8, rel=0.01)


def test_what_pv_tuning_of_8b_needs_is_known_by_hand(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    machine = Machine(host=64 * 10**9, device=80 * 10**9, disk=200 * 10**9)
    usual = EFFORTS["standard"]
    assert usual.training is not None
    saving = replace(
        usual,
        training=replace(
            usual.training,
            microbatch=1,
            recompute_activations=True,
            teacher_first=False,
            states="device",
        ),
        pv=replace(usual.pv, low_memory=True),
    )
    plan = plan_of(folder, machine, recipe=saving, device="cuda")
    assert misfits(plan, machine) == []
    pv = next(phase for phase in plan.phases if phase.name == "PV-Tuning")
    # 6.5 bytes for every quantised weight, the original model, tables in 4 bits, and the head,
    # decoded in 16 bits with its gradient.
    known = 6.5 * 6.98e9 + 2 * 8.03e9 + 0.5 * 1.05e9 + 6 * 0.53e9
    assert known < pv.device_bytes < 1.1 * known


def test_the_original_models_states_take_disk_and_no_host_memory(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    best = EFFORTS["best"]
    assert best.training is not None

    def phase(training: TrainSettings) -> Phase:
        plan = plan_of(folder, recipe=replace(best, training=training), device="cuda")
        return next(phase for phase in plan.phases if phase.name == "PV-Tuning")

    many, few = phase(best.training), phase(replace(best.training, windows=1024))
    assert many.disk_bytes - few.disk_bytes == 2 * (4096 - 1024) * 1024 * 4096
    assert many.host_bytes == few.host_bytes
    # With few steps, only what they see is computed; all of it where the original model goes first.
    short = replace(best.training, steps=1)
    first = phase(replace(short, teacher_first=True))
    assert first.disk_bytes - phase(short).disk_bytes == 2 * (4096 - 16) * 1024 * 4096


def test_the_command_reads_config_json_alone(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    place = ["--device-memory", "24", "--host-memory", "24"]
    command = ["plan", str(folder), "--effort", "quick", *place]
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.output)
    assert report["serving"]["cache_bytes_first_token"] == 131072
    assert report["peak"]["device_bytes"] < 24e9
    phases = ["sampling", "block pass", "layer fit", "block fine-tune", "embedding fit", "write"]
    assert [phase["name"] for phase in report["phases"]] == phases
    text = CliRunner().invoke(app, [*command, "--data", "my.jsonl"]).output
    assert "sampling" not in text and "2.005 bits per weight" in text and "fits" in text


def test_a_plan_that_does_not_fit_names_all_problems_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine.here("cpu", tmp_path)  # what is free must not change between two plans
    monkeypatch.setattr(Machine, "here", lambda device, out: here)
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    command = ["plan", str(folder), "--device-memory", "3", "--host-memory", "64"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 1
    listed = shown.output.partition("this run does not fit:\n")[2].splitlines()
    assert {"--data" in line for line in listed} == {"--no-pv" in line for line in listed}
    problems = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)["problems"]
    assert [f"- {problem}" for problem in problems] == listed


def test_plan_makes_the_recipe_that_tune_would(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: 1x8g8")
    place = ["--device-memory", "80", "--host-memory", "200", "--json"]

    def planned(*options: str) -> dict[str, Any]:
        shown = CliRunner().invoke(app, ["plan", str(folder), *place, *options])
        report: dict[str, Any] = json.loads(shown.output)
        return report

    assert planned("--config", str(file))["scheme"] == "1x8g8"
    assert planned("--config", str(file), "--scheme", "2x8g8")["scheme"] == "2x8g8"

    def pv_seconds(*options: str) -> float | None:
        phases = {phase["name"]: phase["seconds"] for phase in planned(*options)["phases"]}
        return phases.get("PV-Tuning")

    assert pv_seconds("--no-pv") is None
    assert pv_seconds("--effort", "quick") is None
    assert (pv_seconds() or 0) > 0
    assert pv_seconds("--for", "1m") == pytest.approx(24)  # calibration is cut to the rest
    assert (pv_seconds("--effort", "quick", "--for", "100h") or 0) > 0


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    for name in ("llama", "llama-tied", "qwen2"):
        toy_model(name).to(torch.bfloat16).save_pretrained(folder / name)
        toy_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_the_predicted_size_is_the_written_one(tmp_path: Path, dense: Path, name: str) -> None:
    plan = plan_of(dense / name, recipe=QUICK)
    checkpoint = tune(TuneJob(str(dense / name), tmp_path / "out", QUICK), lambda line: None)
    header = 150 * len(checkpoint.tensors)
    assert 0 <= checkpoint.file_bytes() - plan.result.file_bytes < header
    written = checkpoint.linear_bits_per_weight()
    assert plan.result.bits_per_weight_linears == pytest.approx(written)


def test_where_hidden_states_are_kept_changes_no_byte(tmp_path: Path, dense: Path) -> None:
    files = []
    for place in ("memory", "disk"):
        job = TuneJob(str(dense / "llama"), tmp_path / place, QUICK)
        tune(replace(job, activations=place), lambda line: None)
        files.append((tmp_path / place / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_hidden_states_go_to_disk_where_memory_is_short(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    recipe = replace(EFFORTS["best"])
    asked: dict[str, Any] = {"recipe": recipe, "device": "cuda", "sampled": False}
    assert plan_of(folder, **asked).activations == "memory"
    small = replace(ROOMY, host=6 * 10**9)
    plan = plan_of(folder, small, **asked)
    assert plan.activations == "disk"
    assert misfits(plan, small) == []
    forced = plan_of(folder, small, **asked, activations="memory")
    assert "--activations disk" in misfits(forced, small)[0]


def test_what_does_not_fit_is_one_sentence_with_the_numbers_and_the_flag(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    on_gpu = plan_of(folder, device="cuda")
    small_card = replace(ROOMY, device=12 * 10**9)
    (sentence,) = misfits(on_gpu, small_card)
    assert "device memory, 12.0 GB are free" in sentence and "--data" in sentence
    with_text = plan_of(folder, device="cuda", sampled=False)
    assert misfits(with_text, small_card) == []
    (sentence,) = misfits(with_text, replace(ROOMY, disk=10**9))
    assert "of disk, 1.0 GB are free" in sentence and "--out" in sentence


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    """Who follows one sentence must not meet the next one on the next try."""
    folder = config_only(tmp_path / "8b", LLAMA_8B)
    plan = plan_of(folder, recipe=EFFORTS["standard"], device="cuda")
    found = misfits(plan, Machine(host=10**12, device=12 * 10**9, disk=10**9))
    assert sorted(sentence.partition(" needs ")[0] for sentence in found) == [
        "PV-Tuning",
        "PV-Tuning",
        "sampling",
    ]
    advice = {sentence.partition("; ")[2] for sentence in found}
    assert len(advice) == 3
    assert sum("of disk" in sentence for sentence in found) == 1


def test_a_time_limit_shortens_pv_tuning_and_then_what_is_before(tmp_path: Path) -> None:
    plan = plan_of(config_only(tmp_path / "8b", LLAMA_8B), recipe=EFFORTS["best"], device="cuda")
    *before, pv, last = plan.phases
    calibration = sum(phase.seconds for phase in (*before, last))
    enough = calibration / CALIBRATED
    for limit in (enough, 10 * plan.seconds):
        shorter = plan.within(limit)
        assert shorter.cuts.work == pytest.approx(1)
        assert shorter.phases[-2].seconds == pytest.approx(min(pv.seconds, limit - calibration))
        assert shorter.seconds == pytest.approx(min(limit, plan.seconds))
        assert (*shorter.phases[:-2], shorter.phases[-1]) == (*before, last)
    cut = plan.within(enough / 4)
    assert cut.cuts.work == pytest.approx(0.25)
    assert cut.seconds == pytest.approx(enough / 4)
    assert cut.phases[0].seconds == pytest.approx(before[0].seconds / 4)
    assert cut.phases[0].host_bytes == before[0].host_bytes
    none = plan_of(tmp_path / "8b", recipe=replace(EFFORTS["best"], training=None), device="cuda")
    assert none.within(1) == none


def test_tune_says_the_plan_first_and_refuses_what_cannot_fit(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine.here("cpu", tmp_path)
    tiny = replace(here, host=10**6)
    monkeypatch.setattr(Machine, "here", lambda device, out: tiny)
    job = TuneJob(str(dense / "llama"), tmp_path / "out", QUICK)
    lines: list[str] = []
    with pytest.raises(RunError) as refused:
        tune(job, lines.append)
    *problems, last = str(refused.value).splitlines()
    assert all("of host memory, 1.0 MB are free; " in problem for problem in problems)
    assert last == "--force tries nevertheless"
    assert len(lines) == 1 and lines[0].startswith("plan: ")
    assert not (tmp_path / "out").exists()
    tune(replace(job, force=True), lines.append)
    Checkpoint.open(tmp_path / "out").verify()


def test_larger_layers_and_more_rounds_take_longer() -> None:
    seconds = A100.speed().fit_seconds
    base = Recipe()
    assert seconds(4096, 4096, base) < seconds(14336, 4096, base) < seconds(4096, 14336, base)
    longer = replace(base, fit=replace(base.fit, rounds=20))
    assert seconds(4096, 4096, base) < seconds(4096, 4096, longer)
    assert seconds(4096, 4096, replace(base, scheme="1x8g8")) < seconds(4096, 4096, base)


def test_the_last_of_sibling_layers_reads_an_input_of_its_own() -> None:
    (block, *_) = model_shape(toy_model("llama"), QUICK).blocks
    # q, k, v | o | gate, up | down, all of width 128 in the toy
    assert sorted(block.inputs) == [128] * 4


def test_experts_have_moments_of_their_own(tmp_path: Path) -> None:
    toy_model("mixtral").save_pretrained(tmp_path)
    (block, *_) = model_shape(load_skeleton(str(tmp_path)), QUICK).blocks
    # q, k, v | o | and in each of four experts gate | up | down, which are filled up one by one
    assert sorted(block.inputs) == [128] * (2 + 4 * 3)


def test_plan_says_what_tune_says_at_its_start(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("samples: 4\nlength: 32\nfit: {rounds: 1, kmeans_iterations: 2}\n")
    options = ["--config", str(file), "--no-pv", "--scheme", "w2g64", "--device", "cpu"]
    out = ["--out", str(tmp_path / "out")]
    said = []
    for command in ("plan", "tune"):
        shown = CliRunner().invoke(app, [command, str(dense / "llama"), *options, *out])
        assert shown.exit_code == 0, shown.output
        said.append([line for line in shown.output.splitlines() if line.startswith("plan: ")])
    assert len(said[0]) == 1 and said[0] == said[1]
