"""The sections of gpu.py by name. Importing this imports torch and Triton, but starts no CUDA."""

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_checks
import gpu_design
import gpu_rates
import gpu_tools
import gpu_tuning
import torch
from gpu_bench import Bench


def sections(options: Namespace) -> dict[str, Callable[[Bench], None]]:
    """What runs under which name."""
    return {
        "ceilings": gpu_rates.ceilings,
        "correctness": gpu_checks.correctness,
        "gemv": partial(gpu_rates.gemv, peer=options.peer),
        "native": partial(gpu_rates.native, file=options.native),
        "model": gpu_rates.model,
        "tuning": gpu_tuning.tuning,
        "design": gpu_design.design,
        "crossover": gpu_rates.crossover,
        "autotune": gpu_design.autotune,
        "tools": gpu_tools.tools,
    }


def run(name: str, options: Namespace, rows: Path, deadline: float) -> None:
    """Run one; exits with 1 where a case failed. `deadline` is a time of time.time()."""
    device = torch.device("cpu" if options.dry_run else "cuda")
    bench = Bench(name, device, options.dry_run, deadline, rows)
    with torch.no_grad():
        sections(options)[name](bench)
    if bench.failed:
        sys.exit(f"{bench.failed} cases failed")
