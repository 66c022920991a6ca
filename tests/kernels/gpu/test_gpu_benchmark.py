"""benchmarks/gpu.py from end to end on the CPU: the day a GPU is there, it has to work at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_a_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu_interpreter.json").read_text())
    assert result["failures"] == {}
    sections = ("ceilings", "correctness", "gemv", "model", "crossover", "design", "tuning")
    for section in (*sections, "tools"):
        assert result[section], section
    assert result["dry_run"] is True
    assert all(row["passed"] for row in result["correctness"])
    assert {row["config"]["kernel"] for row in result["design"]} >= {"table_in_l1", "replicated"}
    kernels = {row["config"]["kernel"] for row in result["correctness"]}
    assert kernels >= {"lut", "direct", "tile"}
    assert "% of copy" in done.stdout


@pytest.mark.slow
def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch finds no GPU here; --dry-run tries the script itself" in done.stderr
