"""Runs that are killed at any moment, or meet a full disk: the same bytes after the same command.

PVRT_CRASHES is how many of each; `make crash` has fifty kills and two hundred full disks.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import pvrt
from tests.crash.full_disk import built
from tests.crash.kills import killed
from tests.crash.runs import REFUSED, Process, dense_model, digest
from tests.fixtures.imports import ROOT

_YEAR = 365 * 86400
CRASHES = int(os.environ.get("PVRT_CRASHES", "2"))


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    found = killed(CRASHES, 0, tmp_path)
    assert found["kills"] >= CRASHES and not found["problems"]
    assert found["identical"] == found["runs"]


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    if built(tmp_path) is None:
        pytest.skip("no C compiler")
    command = [sys.executable, "-m", "tests.crash.full_disk", "--count", str(CRASHES)]
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*command, "--step", str(max(1, 80 // CRASHES))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["problems"] and found["identical"] == found["points"] == CRASHES
    assert found["refused"]


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_is_told_and_harms_nothing(tmp_path: Path) -> None:
    dense_model(tmp_path / "dense")
    one, two = (
        Process(tmp_path / "dense", tmp_path / "out", tmp_path / name) for name in ("one", "two")
    )
    codes = sorted((one.wait(), two.wait()))
    assert codes in ([0, REFUSED], [0, 0])  # the second may have come when the first was done
    if codes[1]:
        assert "is at work already" in one.said + two.said
    again = Process(tmp_path / "dense", tmp_path / "out", tmp_path / "again")
    assert again.wait() == 0, again.said


def half_done(model: Path, out: Path) -> None:
    """A run that is killed once its first block is finished."""
    run, journal = Process(model, out, out.with_suffix(".log")), out / ".run" / "journal.jsonl"
    while not (journal.exists() and b"block-00000" in journal.read_bytes()):
        assert run.alive, run.said
        time.sleep(0.001)
    assert run.kill_after(0)


@contextmanager
def clock(offset: float) -> Iterator[None]:
    """Inside, the clock of this process is wrong by so many seconds."""
    now, now_ns = time.time, time.time_ns
    with (
        patch("time.time", lambda: now() + offset),
        patch("time.time_ns", lambda: now_ns() + int(offset * 1e9)),
    ):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, years: int) -> None:
    dense_model(tmp_path / "dense")
    whole = Process(tmp_path / "dense", tmp_path / "whole", tmp_path / "log")
    assert whole.wait() == 0, whole.said
    out = tmp_path / "out"
    half_done(tmp_path / "dense", out)
    for number, file in enumerate(sorted(out.rglob("*"))):  # each as if of another time
        os.utime(file, (then := time.time() + (-1) ** number * years * _YEAR, then))
    again = Process(
        tmp_path / "dense", out, tmp_path / "again", partial(clock, years * float(_YEAR))
    )
    assert again.wait() == 0, again.said
    assert digest(out) == digest(tmp_path / "whole")


@contextmanager
def other_versions() -> Iterator[None]:
    """Inside, this process has other packages."""
    ours = patch("pvrt_tune.pipeline.__version__", "0.1.9")
    with patch.object(torch, "__version__", "2.13.9"), ours:
        yield


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_versions_and_says_so(tmp_path: Path) -> None:
    dense_model(tmp_path / "dense")
    whole = Process(tmp_path / "dense", tmp_path / "whole", tmp_path / "log")
    assert whole.wait() == 0, whole.said
    out = tmp_path / "out"
    half_done(tmp_path / "dense", out)
    again = Process(tmp_path / "dense", out, tmp_path / "again", other_versions)
    assert again.wait() == 0, again.said
    names = ("model.safetensors", "config.json", "tokenizer.json")
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    versions = json.loads((out / "pvrt.json").read_text())["versions"]
    here = {"pvrt": pvrt.__version__, "torch": torch.__version__}
    assert versions == [here, {"pvrt": "0.1.9", "torch": "2.13.9"}]
