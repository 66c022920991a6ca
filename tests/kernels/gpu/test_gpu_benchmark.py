"""benchmarks/gpu.py from end to end on the CPU: the day a GPU is there, it has to work at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.slow


def dry_run(
    folder: Path, *options: str
) -> tuple[dict[str, Any], "subprocess.CompletedProcess[str]"]:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    file = folder / "gpu_interpreter.json"
    assert file.is_file(), done.stdout + done.stderr
    return json.loads(file.read_text()), done


def test_a_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    result, done = dry_run(tmp_path)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu.log").read_text()
    assert all(section["trouble"] == "" for section in result["sections"].values())
    sections = ("ceilings", "correctness", "gemv", "model", "tuning", "crossover")
    assert list(result["sections"]) == [*sections, "autotune", "tools"]
    rows = result["rows"]
    for section in result["sections"]:
        assert rows[section], section
    assert result["dry_run"] is True
    assert all(row["passed"] for row in rows["correctness"])
    kernels = {row["config"]["kernel"] for row in rows["correctness"]}
    assert kernels >= {"lut", "direct", "tile"}
    assert "% of copy" in done.stdout


RAISES = "raise RuntimeError('an illegal memory access')"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
HANGS = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],
                             start_new_session=True)
    bench.row(child=child.pid)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("fault", "trouble"),
    [
        (RAISES, "ended with code 1: RuntimeError: an illegal memory access"),
        (DIES, "died by SIGKILL"),
        (HANGS, "killed at its limit"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_section_that_fails_keeps_its_rows_and_costs_no_other(
    tmp_path: Path, fault: str, trouble: str
) -> None:
    native = tmp_path / "candidates.py"
    native.write_text(f"def run(bench):\n    bench.row(kernel='first')\n    {fault.strip()}\n")
    options = ["--only", "ceilings", "native", "tools", "--native", str(native)]
    result, done = dry_run(tmp_path, *options, "--limit", "native=15")
    assert done.returncode == 1
    assert result["sections"]["native"]["trouble"].startswith(trouble)
    assert result["rows"]["native"][0] == {"kernel": "first"}
    assert result["sections"]["tools"]["trouble"] == ""
    assert result["rows"]["ceilings"] and result["rows"]["tools"]
    assert trouble in done.stdout
    if fault == HANGS:
        assert gone(result["rows"]["native"][1]["child"]), "what the section started still runs"


def gone(pid: int) -> bool:
    """Whether a process has ended, within a second."""
    for _ in range(20):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_what_is_not_reached_or_raises_is_named(tmp_path: Path) -> None:
    native = tmp_path / "candidates.py"
    native.write_text(
        "import time\n"
        "def measure(case):\n"
        "    if case == 'second':\n"
        "        raise ValueError('no such tile')\n"
        "    if case == 'third':\n"
        "        time.sleep(2)\n"
        "def run(bench):\n"
        "    bench.deadline = time.time() + 1\n"
        "    bench.each(['first', 'second', 'third', 'fourth'], measure)\n"
        "    return [{'kernel': 'last'}]\n"
    )
    result, done = dry_run(tmp_path, "--only", "native", "--native", str(native))
    assert result["rows"]["native"] == [
        {"case": "second", "error": "ValueError: no such tile"},
        {"not_reached": ["fourth"]},
        {"kernel": "last"},
    ]
    assert result["sections"]["native"]["trouble"] == "ended with code 1: 1 cases failed"
    assert "native: 1 cases were not reached" in done.stdout


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nvidia-smi finds no GPU here; --dry-run tries the script itself" in done.stderr


WARM = """
import gpu_warm
card = gpu_warm.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132)
gpu_warm.install(card)
wanted = gpu_warm.binaries(card)
assert {each.config.kernel for each in wanted} >= {"lut", "direct", "tile", "dense", "rows"}
print(gpu_warm.compile_one(card, wanted[0]))
"""


def test_a_cache_is_filled_without_a_gpu_and_found_again(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", WARM],
            cwd=SCRIPT.parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == "", done.stdout + done.stderr
        found.append({file.relative_to(tmp_path) for file in tmp_path.rglob("*")})
    assert found[0] == found[1]
    names = [file.name.partition(".")[0] for file in found[0] if file.suffix]
    assert names.count("lut_gemv") >= 3, "its binary and metadata"
    assert "cuda_utils" in names
