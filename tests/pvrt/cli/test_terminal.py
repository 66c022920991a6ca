"""How a run looks on a terminal, in a pipe, and to tools."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pvrt
from pvrt.cli.terminal import Course, Show, Terminal
from pvrt.cli.tune import stopped
from pvrt.progress import PLAN, WARNING, Event
from tests.fixtures.command_line import Done, run
from tests.fixtures.gguf_model import write_gguf
from tests.fixtures.interrupted import interrupted_at
from tests.fixtures.toy import small_llama, toy_tokenizer

STAGES = {"sampling": 100.0, "calibration": 200.0, "PV-Tuning": 400.0}
SHORT = ("--effort", "quick", "--samples", "4", "--length", "32", "--no-report")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal") / "dense"
    small_llama().save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def plan(limit: float | None = None) -> Event:
    return Event("plan", PLAN, stages=STAGES, limit=limit)


def test_time_in_all_is_the_plan_s_at_the_pace_of_the_stage_at_hand() -> None:
    course = Course()
    course.see(plan())
    half = Event("", "sampling", 5, 10, 150.0)  # at a third of the speed that was planned
    assert course.see(half)
    assert course.place() == "phase 1 of 3: sampling"
    assert course.left(half) == pytest.approx(150 + 3 * 600)
    tuned = Event("", "PV-Tuning", 1, 4, 300.0)
    assert course.see(tuned) and not course.see(tuned)
    assert course.left(tuned) == 300


def test_time_in_all_is_never_longer_than_there_is() -> None:
    course = Course()
    course.see(plan(limit=500))
    half = Event("", "sampling", 5, 10, 150.0)
    course.see(half)
    left = course.left(half)
    assert left is not None and 490 < left <= 500


def test_a_stage_that_no_plan_knows_has_no_time_in_all() -> None:
    course = Course()
    course.see(plan())
    assert course.left(Event("", "reading", 1, 2, 3.0)) is None
    assert course.left(Event("", "calibration", 0, 2)) is None


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(Show.quiet)
    for line in (plan(), "a line", Event("few tokens", WARNING)):
        terminal(line)
    assert capsys.readouterr() == ("", "warning: few tokens\n")


def tune(dense: Path, out: Path, *options: str) -> Done:
    done = run("tune", str(dense), "-o", str(out), *SHORT, *options)
    assert done.returncode == 0, done.stderr
    return done


def test_lines_name_phases_and_fit_a_hundred_columns(dense: Path, tmp_path: Path) -> None:
    lines = tune(dense, tmp_path / "out").stdout.splitlines()
    assert [line for line in lines if line.startswith("phase ")] == [
        "phase 1 of 3: sampling",
        "phase 2 of 3: calibration",
    ]
    blocks = [line for line in lines if line.startswith("block ")]
    assert len(blocks) == 2 and all("  ETA 0:00:" in line and "  all 0:" in line for line in blocks)
    assert max(map(len, blocks)) < 100
    assert sum(line.startswith("block: ") for line in lines) == 1


def test_tools_get_one_object_a_line(dense: Path, tmp_path: Path) -> None:
    done = tune(dense, tmp_path / "out", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["phase"] == "plan" and events[0]["figures"]["stages"]["calibration"] > 0
    blocks = [event for event in events if event["phase"] == "calibration"]
    assert [(event["done"], event["total"]) for event in blocks] == [(1, 2), (2, 2)]
    assert len(blocks[0]["figures"]["errors"]) == 7
    (result,) = (event for event in events if event["phase"] == "result")
    assert result["figures"]["bits_per_weight_file"] > 2


def test_quiet_tunes_without_a_word(dense: Path, tmp_path: Path) -> None:
    done = tune(dense, tmp_path / "out", "--quiet", "--samples", "8")
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_dry_run_says_what_plan_says_and_writes_nothing(dense: Path, tmp_path: Path) -> None:
    done = run("tune", str(dense), "-o", str(tmp_path / "out"), *SHORT, "--dry-run")
    assert done.returncode == 0 and "this run fits" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_terminal_gets_a_bar_and_the_lines_above_it(dense: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pvrt",
        "tune",
        str(dense),
        "-o",
        str(tmp_path / "out"),
        *SHORT,
    ]
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the terminal is closed
        pass
    assert process.wait() == 0, shown
    text = shown.decode()
    assert "phase 2 of 3: calibration" in text and "━" in text
    assert "block 2/2  " in text and "next: pvrt serve" in text


def test_what_ctrl_c_leaves_depends_on_the_stage(tmp_path: Path) -> None:
    assert "calibration text again" in stopped(tmp_path, "sampling")
    assert f"what is finished is in {tmp_path}" in stopped(tmp_path, "calibration")


def test_a_run_that_goes_on_says_after_which_block(dense: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"effort": "quick", "samples": 4, "length": 32, "report": False}
    with interrupted_at("block 1/") as tell:
        pvrt.tune(dense, tmp_path / "out", on_progress=tell, **asked)
    assert "going on after block 1/2" in tune(dense, tmp_path / "out").stdout.splitlines()


def test_text_that_is_not_there_costs_nothing(dense: Path, tmp_path: Path) -> None:
    done = run("tune", str(dense), "-o", str(tmp_path / "out"), "--data", "nowhere.txt")
    assert done.returncode == 2 and "nowhere.txt does not exist" in done.stderr
    assert not done.stdout and not (tmp_path / "out").exists()


def test_a_result_larger_than_its_source_is_warned_of(tmp_path: Path) -> None:
    """A codebook of 16 bits alone takes more than a toy in float32."""
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "toy.gguf")
    planned = run("plan", str(file), "--length", "64", "--scheme", "1x16g8").stdout
    assert "the result takes" in planned and f"{file} only" in planned
    assert "the result takes" not in run("plan", str(file), "--length", "64").stdout
