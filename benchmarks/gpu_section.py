"""The sections of gpu.py by name. Importing this imports torch and Triton, but starts no CUDA."""

import importlib
import os
import pickle
import sys
import traceback
from argparse import Namespace
from pathlib import Path

import torch
from gpu_bench import Bench

#: The module that holds each section, under its own name.
MODULES = {
    **dict.fromkeys(("ceilings", "gemv", "native", "model", "crossover"), "gpu_rates"),
    "autotune": "gpu_autotune",
    **dict(correctness="gpu_checks", tuning="gpu_tuning", tools="gpu_tools"),
}
FRESH = (
    "import gpu_section, pickle, sys; gpu_section.run(*pickle.loads(bytes.fromhex(sys.argv[1])))"
)


def preload() -> None:
    """Import what sections need, once for all; what cannot be imported fails in its section."""
    for module in dict.fromkeys(MODULES.values()):
        try:
            importlib.import_module(module)
        except Exception:
            traceback.print_exc()


def run(name: str, options: Namespace, rows: Path, deadline: float) -> None:
    """Run one; exits with 1 where a case failed. `deadline` is a time of time.time()."""
    if torch.cuda._is_in_bad_fork():  # an import has started CUDA before the fork: begin anew
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        arguments = pickle.dumps((name, options, rows, deadline)).hex()
        os.execv(sys.executable, [sys.executable, "-c", FRESH, arguments])
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda":
        torch.zeros(1, device=device)  # statistics of memory can be reset only once there are some
    bench = Bench(name, device, options.dry_run, deadline, rows)
    section = getattr(importlib.import_module(MODULES[name]), name)
    more = {"gemv": {"peer": options.peer}, "native": {"file": options.native}}.get(name, {})
    with torch.no_grad():
        section(bench, **more)
    if bench.failed:
        sys.exit(f"{bench.failed} cases failed")
