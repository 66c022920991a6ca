"""One section of gpu.py as a process: `python gpu_section.py NAME ROWS --deadline TIME`."""

import argparse
import importlib
import sys
from functools import partial
from pathlib import Path

import torch
from gpu_bench import Bench

#: The module that holds each section, under its own name.
MODULES = {
    **dict.fromkeys(("ceilings", "gemv", "native", "model", "crossover"), "gpu_rates"),
    "correctness": "gpu_checks",
    "tuning": "gpu_tuning",
    "tools": "gpu_tools",
    **dict.fromkeys(("design", "autotune"), "gpu_design"),
}


def main() -> None:
    """Run it. The exit code is 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=list(MODULES))
    parser.add_argument("rows", type=Path)
    parser.add_argument("--deadline", type=float, required=True, help="in seconds of time.time()")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--native", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    bench = Bench(options.section, device, options.dry_run, options.deadline, options.rows)
    run = getattr(importlib.import_module(MODULES[options.section]), options.section)
    if options.section == "gemv":
        run = partial(run, peer=options.peer)
    if options.section == "native":
        run = partial(run, file=options.native)
    with torch.no_grad():
        run(bench)
    if bench.failed:
        sys.exit(f"{bench.failed} cases failed")


if __name__ == "__main__":
    main()
