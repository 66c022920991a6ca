"""What was broken on purpose, and what came of it: results/reliability.json.

    python benchmarks/reliability.py fuzz [--mutants 10000] [--first 0] [--kind checkpoints]
    python benchmarks/reliability.py kills [--kills 50]
    python benchmarks/reliability.py writes [--writes 200]

fuzz: mutants of everything that is read, added to those of runs before. kills: SIGKILL at random
moments of tuning runs. writes: a disk that is full at each of so many writes. sanitize.py and
soak.py write the rest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import machine
import results

sys.path.insert(0, str(machine.ROOT))
from tests.crash.kills import killed
from tests.fuzz.kinds import KINDS
from tests.fuzz.trials import run

_NAMES = {"crash": "crashes", "traceback": "tracebacks", "hang": "hangs"}
_NAMES |= {"wrongly accepted": "wrongly_accepted"}


def fuzz(mutants: int, first: int, kinds: list[str]) -> dict[str, Any]:
    """Totals by outcome, and the outcomes of each kind, with those of runs before."""
    before = results.load("reliability") or {}
    by_kind = {name: Counter(before.get("kinds", {}).get(name, {})) for name in KINDS}
    for name in kinds:
        counts = run(KINDS[name], range(first, first + mutants))
        by_kind[name] += counts.outcomes
        for fault in counts.faults:
            print(name, *fault, flush=True)
    return totals({name: dict(counts) for name, counts in by_kind.items() if counts})


def totals(by_kind: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The keys of the result file that add up the kinds."""
    every: Counter[str] = sum(map(Counter, by_kind.values()), Counter())
    faults = {name: every[outcome] for outcome, name in _NAMES.items()}
    return {"mutants": every.total(), **faults, "kinds": by_kind}


def kills(count: int) -> dict[str, Any]:
    """Kills, runs that went on after them, and those of them with the right bytes."""
    with tempfile.TemporaryDirectory() as place:
        found = killed(count, 0, Path(place))
    print(found["problems"])
    runs = {"kills_runs": found["runs"], "kills_identical": found["identical"]}
    return {"kills": found["kills"], **runs}


def writes(count: int) -> dict[str, Any]:
    """Points at which the disk was full, and what runs said and left."""
    command = [sys.executable, "-m", "tests.crash.full_disk", "--count", str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(machine.ROOT), *sys.path])}
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(found.pop("problems"))
    return {"writes_failed": found["points"], "writes": found}


def main() -> None:
    """Try, and add what was found to the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["fuzz", "kills", "writes"])
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--writes", type=int, default=200)
    given = parser.parse_args()
    if given.part == "fuzz":
        found = fuzz(given.mutants, given.first, given.kind or list(KINDS))
    else:
        found = kills(given.kills) if given.part == "kills" else writes(given.writes)
    record = {**(results.load("reliability") or {}), **found, **machine.describe()}
    results.store("reliability", record)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
