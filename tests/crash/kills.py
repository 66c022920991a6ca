"""Runs that SIGKILL ends at random moments, one after the other in the same folder.

    python -m tests.crash.kills --kills 50

Prints a line of JSON: kills, runs that were whole afterwards, and those of them whose files have
the bytes of one that was never disturbed.
"""

import argparse
import json
import random
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.crash.runs import Process, dense_model, digest


def killed(kills: int, seed: int, place: Path) -> dict[str, Any]:
    """Kill runs until there were `kills`; every second one has been killed before as well."""
    draw = random.Random(seed)
    dense_model(place / "dense")
    before = _child_seconds()
    first = Process(place / "dense", place / "whole", place / "log")
    assert first.wait() == 0, first.said
    length, right = _child_seconds() - before, digest(place / "whole")
    counts: dict[str, Any] = {"kills": 0, "runs": 0, "identical": 0, "problems": []}
    while counts["kills"] < kills:
        out = place / "out"
        for _ in range(draw.choice([1, 2, 3])):
            run = Process(place / "dense", out, place / "log")
            counts["kills"] += run.kill_after(draw.uniform(0, length))
        again = Process(place / "dense", out, place / "log")
        same = again.wait() == 0 and digest(out) == right
        counts["runs"] += 1
        counts["identical"] += same
        if not same:
            counts["problems"].append([counts["kills"], again.said[:300]])
        shutil.rmtree(out)
    return counts


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(killed(given.kills, given.seed, Path(place))))


if __name__ == "__main__":
    main()
