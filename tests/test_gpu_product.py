"""benchmarks/gpu_product.py on the CPU: the day a GPU is there, it has to work at once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_product.py"
pytestmark = pytest.mark.slow


def dry_run(out: Path, *items: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the records of the items, and what was printed."""
    command = [sys.executable, str(SCRIPT), "--dry-run", "--patience", "5", "--out", str(out)]
    done = subprocess.run([*command, "--only", *items], capture_output=True, text=True)
    stored = json.loads((out / "gpu_product.json").read_text())
    assert stored["dry_run"] is True
    return done.returncode, stored["items"], done.stdout + done.stderr


def test_a_dry_run_tunes_and_loads_a_toy(tmp_path: Path) -> None:
    code, items, printed = dry_run(tmp_path, "doctor", "toy", "load_float16", "pv_step")
    assert code == 0, printed
    assert set(items) == {"doctor", "toy", "load_float16", "pv_step"}
    assert list(items).index("toy") < list(items).index("load_float16")
    kls = items["toy"]["figures"]["held_out_kl"]
    assert kls["llama"] == kls["on-cpu"]  # the same device: the comparison is of the same run
    assert set(items["toy"]["figures"]["commands"]["llama"]["seconds"]) >= {"PV-Tuning", "write"}
    assert all(error < 1e-2 for error in items["load_float16"]["figures"]["errors"].values())
    assert items["pv_step"]["figures"]["rows"]["low memory"]["planned"] > 0


def test_what_fails_is_recorded_and_stops_nothing(tmp_path: Path) -> None:
    code, items, printed = dry_run(tmp_path, "load_float16", "layer_fit")  # without its toy
    assert code == 1
    assert set(items["load_float16"]["failures"]) == {"llama", "llama-tied"}
    assert "OSError" in "".join(items["load_float16"]["failures"]["llama"])
    assert items["layer_fit"]["passed"] and "load_float16" in printed
