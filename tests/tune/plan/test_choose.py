"""What a recipe leaves open is chosen so that the run fits, and what it says stays.

The shapes are those of published models; their peaks are held to what stages state, which
test_peak_bytes.py holds to what they allocate.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pvrt.cli import app
from pvrt.errors import RunError
from pvrt_tune.data.source_model import load_skeleton
from pvrt_tune.distil.student import Student
from pvrt_tune.machine import Machine
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.cards import CARDS, assumed, named
from pvrt_tune.plan.choose import plan_run
from pvrt_tune.plan.memory_plan import Plan, Request
from pvrt_tune.plan.on_machine import plan_here
from pvrt_tune.plan.report import misfits
from pvrt_tune.settings import EFFORTS, PVSettings, Recipe, TrainSettings, TuneJob
from pvrt_tune.store import choices_of
from tests.fixtures.interrupted import interrupted_at
from tests.fixtures.shapes import LLAMA_8B, config_only, folder_of
from tests.tune.test_device import LOOP, RECIPE, dense, small_measurements, weights

__all__ = ["dense", "small_measurements"]  # fixtures

STANDARD = EFFORTS["standard"]
USUAL: dict[str, Any] = {
    "move_codes": True,
    "microbatch": 4,
    "recompute_activations": False,
    "teacher_first": False,
    "states": "device",
    "low_memory": False,
    "snapshots": True,
}


def planned(
    folder: Path, machine: Machine, recipe: Recipe = STANDARD, *, sampled: bool = True
) -> Plan:
    speed = assumed((machine.device or 0) / 1e9).speed()
    request = Request(str(folder), recipe, "cuda", sampled)
    return plan_run(load_skeleton(str(folder)), request, speed, machine)


def machine(device: float, host: float, disk: float = 40) -> Machine:
    """Sizes in GB."""
    return Machine(int(host * 1e9), int(device * 1e9), int(disk * 1e9))


def chosen(plan: Plan) -> dict[str, Any]:
    """What is not as usual, by name."""
    found = {n: v for n, v in plan.request.recipe.choices.items() if v != USUAL[n]}
    return found | ({"stream": True} if plan.stream else {})


#: As its config.json says.
MIXTRAL_8X22B = LLAMA_8B | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_attention_heads": 48,
    "num_hidden_layers": 2,  # of 56, which are alike
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32768,
}
HOST = {"states": "host", "snapshots": False}
TWICE = {"recompute_activations": True}
FIRST = {"teacher_first": True}
LOW = {"low_memory": True}


@pytest.mark.parametrize(
    ("model", "device", "host", "wanted", "most"),
    [
        # The bars: on cards that people own, in machines that they have.
        ("1B", 8, 16, HOST | TWICE | {"stream": True}, 4.7),
        ("3B", 12, 32, HOST | FIRST | {"microbatch": 2}, 10.8),
        ("8B", 24, 32, HOST | FIRST | TWICE | LOW, 17.1),
        ("8B", 24, 96, HOST | FIRST | TWICE, 17.1),
        ("14B", 48, 64, HOST | FIRST | LOW, 41.7),
        ("14B", 48, 192, HOST | FIRST, 41.7),
        # Smaller ones, on which the original model does not fit either.
        ("8B", 12, 32, HOST | FIRST | TWICE | LOW | {"stream": True}, 11),
        ("14B", 24, 64, HOST | TWICE | LOW | {"stream": True}, 19.1),
        # Where the exact way takes several times as long, and where nothing has to be chosen.
        ("8B", 80, 256, FIRST | LOW | {"snapshots": False}, 68.1),
        ("1B", 24, 32, {"snapshots": False}, 22.3),
    ],
)
def test_it_fits(
    model: str, device: float, host: float, wanted: dict[str, Any], most: float, tmp_path: Path
) -> None:
    here = machine(device, host)
    plan = planned(folder_of(model, tmp_path), here)
    assert misfits(plan, here) == []
    assert chosen(plan) == wanted
    (pv,) = (phase for phase in plan.phases if phase.name == "PV-Tuning")
    assert most - 0.5 < pv.device_bytes / 1e9 < most


def test_calibration_of_70b_fits_24_gb_with_8_gb_of_host_memory(tmp_path: Path) -> None:
    folder, here = folder_of("70B", tmp_path), machine(24, 8)
    recipe = replace(STANDARD, training=None)
    plan = planned(folder, here, recipe)
    assert misfits(plan, here) == []
    assert plan.stream and plan.chosen is not None and "block by block" in plan.chosen
    given = planned(folder, here, recipe, sampled=False)
    assert not given.stream and given.chosen is None
    assert given.seconds < plan.seconds - 3600
    # Weights that host memory cannot keep come from the disk.
    assert planned(folder, machine(24, 200), recipe).seconds < plan.seconds / 2
    assert max(phase.device_bytes for phase in given.phases) < 22e9  # four factors of H
    assert max(phase.host_bytes for phase in plan.phases) < 6e9


def test_on_a_cpu_states_are_on_the_host_anyway(tmp_path: Path) -> None:
    folder, speed = folder_of("1B", tmp_path), named("RTX 4060").speed()
    recipe = replace(STANDARD, training=TrainSettings(compute="float32"))

    def on_host(size: float) -> Plan:
        here = Machine(int(size), None, 10**12)
        request = Request(str(folder), recipe, "cpu", sampled=False)
        plan = plan_run(load_skeleton(str(folder)), request, speed, here)
        assert misfits(plan, here) == []
        assert not {"states", "stream"} & chosen(plan).keys()
        return plan

    usual = on_host(1e12)
    need = usual.peak("host_bytes").host_bytes
    assert chosen(usual) == {"snapshots": False}
    assert chosen(on_host(need)) == {"snapshots": False}
    less = on_host(need - 1)
    assert chosen(less).keys() & {"teacher_first", "microbatch", "recompute_activations"}
    assert f"{(need - 1) / 1e9:.1f} GB that are free" in (less.chosen or "")
    assert "low_memory" not in chosen(less)
    assert chosen(on_host(0.6 * need))["low_memory"]


def test_more_memory_never_takes_longer(tmp_path: Path) -> None:
    """But for the result that does not differ."""
    folder, speed = folder_of("3B", tmp_path), named("RTX 4090").speed()
    exact = replace(STANDARD, pv=PVSettings(low_memory=False))
    times = []
    for size in (8, 12, 16, 24, 32, 48, 80):
        here = machine(size, 64)
        request = Request(str(folder), exact, "cuda", False)
        plan = plan_run(load_skeleton(str(folder)), request, speed, here)
        assert misfits(plan, here) == []
        times.append(plan.seconds)
    assert times == sorted(times, reverse=True) and times[-1] < times[0]


@pytest.mark.parametrize(
    ("training", "pv"),
    [
        ({"microbatch": 3}, {}),
        ({"recompute_activations": False}, {}),
        ({"teacher_first": False}, {}),
        ({"snapshots": True}, {}),
        ({}, {"low_memory": False}),
        ({"states": "device"}, {}),
    ],
)
def test_what_the_recipe_says_stays(
    training: dict[str, Any], pv: dict[str, Any], tmp_path: Path
) -> None:
    recipe = replace(STANDARD, training=TrainSettings(**training), pv=PVSettings(**pv))
    here = machine(24, 40, disk=1000)
    plan = planned(folder_of("8B", tmp_path), here, recipe)
    found = plan.request.recipe.choices
    assert found.items() >= (training | pv).items()
    assert None not in found.values()
    (pv_phase,) = (phase for phase in plan.phases if phase.name == "PV-Tuning")
    if training.get("states") == "device" or pv or training.get("teacher_first") is False:
        return
    assert misfits(plan, here) == [], pv_phase


def test_snapshots_are_for_long_runs_on_disks_with_room(tmp_path: Path) -> None:
    folder = folder_of("1B", tmp_path)
    long = EFFORTS["best"]
    for recipe, disk, wanted in ((STANDARD, 400, False), (long, 400, True), (long, 25, False)):
        plan = planned(folder, machine(8, 64, disk), recipe)
        assert plan.request.recipe.choices["snapshots"] is wanted
        assert ("no snapshots" in (plan.chosen or "")) is not wanted
        assert misfits(plan, machine(8, 64, disk)) == []


def test_nothing_is_chosen_where_all_fits_and_states_are_small(tmp_path: Path) -> None:
    small = LLAMA_8B | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    folder = config_only(tmp_path / "small", small)
    plan = planned(folder, machine(80, 64))
    assert chosen(plan) == {} and plan.chosen is None


def test_what_no_choice_fits_is_refused_with_all_problems(tmp_path: Path) -> None:
    folder = folder_of("70B", tmp_path)
    command = ["plan", str(folder), "--card", "rtx-4090", "--host-memory", "64"]
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert shown.exit_code == 1
    report = json.loads(shown.output)
    needed = {problem.partition(" of ")[2].partition(",")[0] for problem in report["problems"]}
    assert {"device memory", "host memory"} <= needed
    assert all("--no-pv" in p for p in report["problems"] if "memory" in p)
    # What is shown lacks least.
    assert report["choices"]["states"] == "host" and report["choices"]["low_memory"]


def test_settings_that_keep_a_run_from_fitting_are_named(tmp_path: Path) -> None:
    folder, file = folder_of("8B", tmp_path), tmp_path / "recipe.yaml"
    file.write_text("training: {states: device, teacher_first: true}\n")
    command = ["plan", str(folder), "--config", str(file), "--card", "rtx-4090"]
    shown = CliRunner().invoke(app, [*command, "--host-memory", "96", "--data", "x.txt"])
    assert shown.exit_code == 1
    (problem,) = (line for line in shown.output.splitlines() if "- PV-Tuning needs" in line)
    assert problem.endswith("leave teacher_first, states to the plan, which finds what fits")


def test_the_plan_says_what_was_chosen_why_and_what_it_costs(tmp_path: Path) -> None:
    command = ["plan", str(folder_of("8B", tmp_path)), "--card", "RTX 4090", "--host-memory", "96"]
    shown = CliRunner().invoke(app, command)
    (line,) = (text for text in shown.output.splitlines() if text.startswith("chosen: "))
    assert "host memory" in line and "24.0 GB that are free" in line
    assert " min instead of " in line and "no snapshots" in line
    assert "data sheet of RTX 4090, not measured" in shown.output
    assert "assumed" not in shown.output


def test_a_card_that_nobody_named_is_a_slow_one_of_its_memory() -> None:
    assert [assumed(size).name for size in (6, 8, 11.5, 23.6, 24, 40, 300)] == [
        "RTX 4060",
        "RTX 4060",
        "RTX 3060",
        "RTX 3090",
        "RTX 3090",
        "RTX A6000",
        "H200",
    ]
    assert "RTX 3090 (assumed" in assumed(24).speed(" (assumed)").basis
    assert named("rtx_4090") is named("RTX 4090")
    with pytest.raises(RunError, match="--card RTX 9999 is not in the table; it has RTX 4060"):
        named("RTX 9999")
    # Of one memory the slowest is first, which `assumed` relies on.
    for one, other in pairwise(CARDS):
        assert one.memory < other.memory or one.half <= other.half


def test_a_run_begun_before_there_was_a_choice_goes_on_as_it_was(tmp_path: Path) -> None:
    """Its fingerprint has all that there was to say then."""
    before = {n: v for n, v in USUAL.items() if n not in ("states", "snapshots", "low_memory")}
    recipe = {"training": before, "pv": {"low_memory": True}}
    (tmp_path / ".run").mkdir()
    (tmp_path / ".run" / "fingerprint.json").write_text(json.dumps({"recipe": recipe}))
    assert choices_of(tmp_path) == USUAL | {"low_memory": True}
    folder = folder_of("8B", tmp_path)
    job = TuneJob(str(folder), tmp_path, STANDARD, device="cuda")
    report, problems = plan_here(job, card="RTX 4090", host_memory=96)
    assert report["choices"] == USUAL | {"low_memory": True}
    assert any("--restart finds what fits" in problem for problem in problems)
    report, problems = plan_here(replace(job, restart=True), card="RTX 4090", host_memory=96)
    assert report["choices"]["states"] == "host" and not any("PV" in each for each in problems)


def test_a_card_is_no_cpu(tmp_path: Path) -> None:
    job = TuneJob(str(folder_of("1B", tmp_path)), tmp_path, STANDARD, device="cpu")
    with pytest.raises(RunError, match="--card is for GPUs"):
        plan_here(job, card="H100")


# ---- a run does what was chosen ----

#: All but where states are is said.
OPEN = replace(
    RECIPE,
    training=replace(LOOP, recompute_activations=False, teacher_first=True, snapshots=True),
    pv=replace(RECIPE.pv, low_memory=False),
)


def pv_bytes(dense: Path, recipe: Recipe, device: str) -> int:
    """What PV-Tuning needs of the device where all is as usual."""
    here = machine(1000, 1000, 1000)
    request = Request(str(dense), recipe, device, True)
    plan = plan_run(load_skeleton(str(dense)), request, named("A100 80GB").speed(), here)
    return max(phase.device_bytes for phase in plan.phases if phase.name == "PV-Tuning")


def stopped_in_pv_tuning(job: TuneJob) -> list[str]:
    """What a run reports until its second step of PV-Tuning, at which it is stopped."""
    lines: list[str] = []

    with interrupted_at("PV step 2/") as tell:

        def report(line: str) -> None:
            lines.append(line)
            tell(line)

        tune(job, report)
    return lines


def test_a_run_that_has_to_choose_ends_with_the_same_bytes_and_keeps_what_it_chose(
    dense: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed: list[bool] = []
    student = Student.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, model: Any, compute: Any, *, stream: bool = False) -> Any:
        streamed.append(stream)
        return student(cls, model, compute, stream=stream)

    monkeypatch.setattr(Student, "of", classmethod(of))
    job = TuneJob(str(dense), tmp_path / "roomy", OPEN, device=device)
    tune(job, lambda line: None)
    free = pv_bytes(dense, OPEN, device) - 1
    small = Machine(10**12, free, 10**12)
    monkeypatch.setattr(Machine, "here", lambda device, out: small)
    job = replace(job, out=tmp_path / "small")
    lines = stopped_in_pv_tuning(job)
    assert lines[0].startswith("plan: ") and lines[1].startswith("chosen: latent weights")
    # With less than it has begun with, it says what to do.
    report, problems = plan_here(job, device_memory=0.6)
    assert report["choices"]["states"] == "host"
    assert any("device memory" in problem for problem in problems)
    # There is room again: the run goes on as it began.
    monkeypatch.setattr(Machine, "here", lambda device, out: machine(1000, 1000, 1000))
    lines.clear()
    tune(job, lines.append)
    assert not any(line.startswith("chosen: ") for line in lines)
    assert any(line.startswith("PV step 4/") for line in lines)
    assert streamed == [False, True, True]
    assert weights(tmp_path / "small") == weights(tmp_path / "roomy")
    assert "states: host" in (tmp_path / "small" / ".run" / "config.yaml").read_text()


def test_a_run_whose_original_is_streamed_ends_with_the_same_bytes(
    dense: Path, tmp_path: Path, device: str
) -> None:
    """The text that it writes, its states, and all that follows."""
    for first in (False, True):
        recipe = replace(OPEN, training=replace(LOOP, teacher_first=first))
        job = TuneJob(str(dense), tmp_path / f"held {first}", recipe, device=device)
        tune(job, lambda line: None)
        job = replace(job, out=tmp_path / f"streamed {first}", stream=True)
        tune(job, lambda line: None)
        assert weights(job.out) == weights(tmp_path / f"held {first}")


def test_without_snapshots_a_run_begins_pv_tuning_anew_to_the_same_bytes(
    dense: Path, tmp_path: Path, device: str
) -> None:
    training = replace(LOOP, snapshots=False)
    job = TuneJob(str(dense), tmp_path / "whole", replace(OPEN, training=training), device=device)
    tune(job, lambda line: None)
    job = replace(job, out=tmp_path / "stopped")
    lines = stopped_in_pv_tuning(job)
    pieces = sorted(path.name for path in (job.out / ".run" / "pieces").iterdir())
    assert not any(name.startswith("pv-state") for name in pieces)
    lines.clear()
    tune(job, lines.append)
    assert sum(line.startswith("PV step 2/") for line in lines) == 1
    assert not any(line.startswith("block ") for line in lines)
    assert weights(job.out) == weights(tmp_path / "whole")


def test_codes_stay_in_block_tuning_where_their_latent_weights_do_not_fit(tmp_path: Path) -> None:
    """Blocks of 2.5 billion weights: the 12 bytes of each are more than a card of 32 GB has."""
    folder = config_only(tmp_path / "8x22B", MIXTRAL_8X22B)
    recipe = replace(STANDARD, training=None)
    roomy, small = (planned(folder, machine(size, 512, 400), recipe) for size in (80, 32))
    assert roomy.request.recipe.finetune.move_codes is True
    assert roomy.chosen is None
    assert small.request.recipe.finetune.move_codes is False
    assert small.chosen is not None and "codes stay in block tuning" in small.chosen
    assert not misfits(small, machine(32, 512, 400))
    said = replace(recipe, finetune=replace(recipe.finetune, move_codes=True))
    assert misfits(planned(folder, machine(32, 512, 400), said), machine(32, 512, 400))
