"""Runs that are killed at any moment, or meet a full disk: the same bytes after the same command.

PVRT_CRASHES is how many of each; `make crash` has fifty kills and two hundred full disks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.full_disk import built
from tests.crash.kills import killed
from tests.crash.runs import REFUSED, Process, dense_model
from tests.fixtures.imports import ROOT

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
