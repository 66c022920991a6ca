"""Measurements in processes of their own, one per setting: threads are fixed when one starts."""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import machine


def options(description: str, rounds: int) -> argparse.Namespace:
    """Arguments of a script: --threads, --rounds, and --worker where `measured` started it."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(script: str, threads: int, rounds: int, **environment: str) -> list[dict[str, Any]]:
    """The rows that a script prints as JSON with --worker, and what machine it ran on."""
    command = [sys.executable, script, "--worker", "--threads", str(threads)]
    command += ["--rounds", str(rounds)]
    given = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    done = subprocess.run(command, env=given, stdout=subprocess.PIPE, check=True)
    about = {"shared_machine": machine.shared(threads), **machine.describe()}
    return [{**row, **about} for row in json.loads(done.stdout)]
