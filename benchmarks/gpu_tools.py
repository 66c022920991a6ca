"""Section `tools` of gpu.py: ncu and compute-sanitizer on small cases, where they are installed.

Run by itself, `python benchmarks/gpu_tools.py` is that small case: one launch of every kernel.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import gpu_checks
import torch
from gpu_bench import Bench

from pvrt_kernels.packed import aqlm_packed_linear

COMMANDS = {
    "ncu": [
        *("ncu", "--set", "full", "--clock-control", "none", "--print-details", "all"),
        *("--kernel-name", "lut_gemv", "--launch-count", "1"),
    ],
    "memcheck": ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"],
    "racecheck": ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"],
}
CASES = (("2x8g8", 1), ("2x8g8", 2), ("1x16g8", 1), ("2x8g8", 16), ("2x8g8", 300))


def tools(bench: Bench) -> None:
    """One row per tool: its exit code and the end of what it printed."""

    def run(name: str) -> None:
        command = COMMANDS[name]
        if bench.dry or shutil.which(command[0]) is None:
            reason = "not run" if bench.dry else f"{command[0]} is not installed"
            bench.row(tool=name, result=reason)
            return
        left = max(5.0, bench.left)
        case = [*command, sys.executable, str(Path(__file__).resolve())]
        try:
            done = subprocess.run(case, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            bench.row(tool=name, result=f"not finished after {left:.0f} s")
            return
        bench.row(tool=name, code=done.returncode, output=(done.stdout + done.stderr)[-20000:])

    bench.each(list(COMMANDS), run)


def small_case() -> None:
    """One launch of every kernel, for tools that slow a program down a hundred times."""
    device = torch.device("cuda")
    for scheme, tokens in CASES:
        layer, exact = gpu_checks.checked_layer(device, scheme, 2100, 512, torch.float16)
        x = torch.randn(tokens, 512, device=device).half()
        error = float((aqlm_packed_linear(x, layer).double() - x.double() @ exact.T).abs().max())
        print(scheme, tokens, error)


if __name__ == "__main__":
    small_case()
