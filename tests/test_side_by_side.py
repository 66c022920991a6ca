"""The suite in several processes: what they hand to the one that started them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pvrt_kernels.cpu.library import INSTRUCTION_SETS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_instruction_sets_that_workers_met_are_added_up(tmp_path: Path) -> None:
    for name in ("test_one.py", "test_two.py"):  # a worker each
        (tmp_path / name).write_text("def test_it(isa: str) -> None:\n    assert isa\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.fixtures.instruction_sets"]
    command += ["--numprocesses=2", "--dist=loadfile", f"--rootdir={tmp_path}", str(tmp_path)]
    roots = [str(ROOT / folder) for folder in (".", "tune", "server", "kernels")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if ": tested " in line]
    assert len(lines) == len(INSTRUCTION_SETS), done.stdout + done.stderr
    assert all(line.endswith("(2 tests)") for line in lines), lines
