"""PV-Tuning as a stage of `tune`: kills, time limits and interrupts leave what they should."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pvrt
from pvrt.format.aqlm import Checkpoint
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import PVSettings, TrainSettings, TuneJob
from pvrt_tune.settings.files import as_yaml
from tests.tune.test_pipeline import QUICK, dense_folder

pytestmark = pytest.mark.slow
RECIPE = replace(
    QUICK,
    training=TrainSettings(
        windows=16, steps=30, batch=4, microbatch=4, held_out=4, evaluate_every=3
    ),
    pv=PVSettings(learning_rate=5e-3, code_learning_rate=0.03, fraction=0.02),
)
STEP_CALLS = 5000  # of Python, in about one step
SCRIPT = """
import signal, sys; sys.path[:0] = {paths!r}
from pathlib import Path
from tests.fixtures.strike import strike
from tests.tune.distil.test_stage import RECIPE
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import TuneJob
{before}
tune(TuneJob({model!r}, Path({out!r}), RECIPE), lambda line: print(line, flush=True))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pv-stage") / "dense"
    dense_folder(folder, "llama-tied", torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def whole(dense: Path) -> tuple[Path, list[str]]:
    """An uninterrupted run and its progress lines."""
    lines: list[str] = []
    tune(TuneJob(str(dense), dense.parent / "whole", RECIPE), lines.append)
    return dense.parent / "whole", lines


def struck(dense: Path, out: Path, line: str, calls: int, number: str) -> int:
    """The return code of a run that gets a signal so many calls after a line."""
    before = f"strike({line!r}, {calls}, signal.{number})"
    script = SCRIPT.format(paths=sys.path, model=str(dense), out=str(out), before=before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert line in done.stdout, done.stderr
    return done.returncode


def held_out_kls(lines: list[str]) -> list[float]:
    """What the progress lines say."""
    return [
        float(text.split("held-out KL ")[1].split()[0]) for text in lines if "held-out KL " in text
    ]


def test_the_stage_lowers_the_held_out_kl_and_says_so(whole: tuple[Path, list[str]]) -> None:
    out, lines = whole
    kls = held_out_kls(lines)
    manifest = json.loads((out / "pvrt.json").read_text())
    assert manifest["pv"]["held_out_kl"] < kls[0]
    assert manifest["pv"]["held_out_kl"] == pytest.approx(min(kls), abs=1e-4)
    checkpoint = Checkpoint.open(out)
    checkpoint.verify()
    assert checkpoint.read("model.norm.weight").dtype is torch.bfloat16
    assert not (out / ".run" / "pieces").exists()
    assert pvrt.load(out).dtype is torch.bfloat16


def test_killed_anywhere_it_resumes_to_the_same_bytes(
    dense: Path, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Two kills, each somewhere in the step after a line of PV-Tuning."""
    out = tmp_path / "killed"
    calls = random.Random(20261122)
    for after in ("PV step 6/", "PV step "):
        code = struck(dense, out, after, calls.randrange(STEP_CALLS), "SIGKILL")
        assert code == -signal.SIGKILL
        Checkpoint.open(out).verify()  # calibration's checkpoint can be served all along
    lines: list[str] = []
    tune(TuneJob(str(dense), out, RECIPE), lines.append)
    assert not any(line.startswith(("block", "PV step 0/", "PV step 3/")) for line in lines)
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (out, whole[0]))
    assert ours == theirs


def test_a_time_limit_plans_the_steps_and_leaves_the_best_so_far(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RECIPE.training is not None
    long = replace(RECIPE, training=replace(RECIPE.training, steps=100_000))
    # To training, ten minutes pass whenever it looks: the machine's own pace is lost in that.
    looks = itertools.count()
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + 600 * next(looks), perf_counter=time.perf_counter
    )
    monkeypatch.setattr("pvrt_tune.distil.trainer.time", clock)
    out = tmp_path / "out"
    lines: list[str] = []
    tune(TuneJob(str(dense), out, long, seconds=36_000.0), lines.append)
    planned = next(line for line in lines if "fit into the time" in line)
    assert 10 <= int(planned.split()[0]) <= 60
    manifest = json.loads((out / "pvrt.json").read_text())
    kls = held_out_kls(lines)
    assert manifest["pv"]["held_out_kl"] == pytest.approx(min(kls), abs=1e-4)
    Checkpoint.open(out).verify()


def test_a_slow_start_does_not_shorten_the_run(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first steps wait for the original model's states of many: the plan is made anew."""
    assert RECIPE.training is not None
    long = replace(RECIPE, training=replace(RECIPE.training, steps=100_000))
    looks = itertools.chain(range(0, 6000, 600), itertools.count(6000, 200))
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + next(looks), perf_counter=time.perf_counter
    )
    monkeypatch.setattr("pvrt_tune.distil.trainer.time", clock)
    lines: list[str] = []
    tune(TuneJob(str(dense), tmp_path / "out", long, seconds=24_000.0), lines.append)
    first, *later = (int(line.split()[0]) for line in lines if "fit into the time" in line)
    assert later and later[-1] > 1.3 * first


def test_ctrl_c_leaves_the_best_so_far(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    struck(dense, out, "PV step 3/", STEP_CALLS // 2, "SIGINT")
    assert "held_out_kl" in json.loads((out / "pvrt.json").read_text())["pv"]
    Checkpoint.open(out).verify()


# ---- several processes ----


def torchrun(dense: Path, out: Path, ranks: int = 2) -> list[str]:
    """The command line for a run of several processes."""
    config = dense.parent / "recipe.yaml"
    config.write_text(as_yaml(RECIPE))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "pvrt", "tune", str(dense), "-o", str(out)]
    return [*command, "--config", str(config), "--effort", "quick"]


@pytest.fixture(scope="module")
def sharded(dense: Path) -> tuple[Path, str]:
    """An uninterrupted run of two processes and what they print."""
    out = dense.parent / "sharded"
    done = subprocess.run(torchrun(dense, out), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_torchrun_tunes_one_model_with_two_processes(
    whole: tuple[Path, list[str]], sharded: tuple[Path, str]
) -> None:
    out, printed = sharded
    assert printed.count("PV step 30/30") == printed.count("next: pvrt serve") == 1  # one speaks
    Checkpoint.open(out).verify()
    ours, theirs = (held_out_kls(lines) for lines in (printed.splitlines(), whole[1]))
    assert ours[0] == theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_several_processes_tune_a_checkpoint_on(
    dense: Path, sharded: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*torchrun(sharded[0], out), "--from", str(dense)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "block 1/" not in done.stdout
    earlier, kls = (held_out_kls(text.splitlines()) for text in (sharded[1], done.stdout))
    assert kls[0] == pytest.approx(min(earlier), rel=0.05)  # rounded as it is stored
    assert min(kls) < kls[0]
    before, after = Checkpoint.open(sharded[0]), Checkpoint.open(out)
    after.verify()
    assert before.layers == after.layers


def test_ctrl_c_under_torchrun_stops_all_and_the_same_command_goes_on(
    dense: Path, sharded: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = torchrun(dense, out)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        seen = []
        for line in run.stdout:
            seen.append(line)
            if line.startswith("PV step 6/"):
                os.killpg(run.pid, signal.SIGINT)
    text = "".join(seen)
    assert run.returncode != 0
    assert text.count("stopped; what is finished") == 1, text
    assert "PV step 30/" not in text
    manifest = json.loads((out / "pvrt.json").read_text())
    assert manifest["pv"]["step"] == 6 and manifest["blocks"], text
    Checkpoint.open(out).verify()
    again = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert "PV step 6/" not in again.stdout and "PV step 9/" in again.stdout
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (out, sharded[0]))
    assert ours == theirs
