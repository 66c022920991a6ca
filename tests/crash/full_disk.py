"""Runs on a disk that is full after so many writes, each followed by one on a disk with room.

    python -m tests.crash.full_disk --first 0 --count 200 --step 1

It starts itself again with full_disk.c before libc, and prints a line of JSON: points tried, runs
that said it in a sentence, those that ended whole because they write no more, and those that broke;
runs afterwards whose files have the bytes of one that was never disturbed.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.crash.runs import REFUSED, Process, dense_model, digest

SOURCE = Path(__file__).with_suffix(".c")
_VARIABLE = "PVRT_FULL_DISK"


def built(folder: Path) -> Path | None:
    """The library, made of its source; None where there is no C compiler."""
    compiler, target = shutil.which(os.environ.get("CC", "cc")), folder / "full_disk.so"
    if compiler is None:
        return None
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return target


@contextmanager
def room(writes: int) -> Iterator[None]:
    """Inside, this process may write so often; needs the library before libc."""
    disk = ctypes.CDLL(os.environ[_VARIABLE])
    disk.disk_room(ctypes.c_long(writes))
    try:
        yield
    finally:
        disk.disk_room(ctypes.c_long(-1))


def tried(points: range, place: Path) -> dict[str, Any]:
    """What became of runs for which the disk was full after each of `points` writes."""
    dense_model(place / "dense")
    first = Process(place / "dense", place / "whole", place / "log")
    assert first.wait() == 0, first.said
    right = digest(place / "whole")
    counts: dict[str, Any] = dict.fromkeys(("points", "refused", "whole", "broke", "identical"), 0)
    counts["problems"] = []
    for point in points:
        out, log = place / f"out{point}", place / f"log{point}"
        run = Process(place / "dense", out, log, partial(room, point))
        code = run.wait()
        kind = {0: "whole", REFUSED: "refused"}.get(code, "broke")
        if kind == "refused" and "No space left" not in run.said:
            kind = "broke"
        again = Process(place / "dense", out, place / "again")
        same = again.wait() == 0 and digest(out) == right
        counts["points"] += 1
        counts[kind] += 1
        counts["identical"] += same
        if kind == "broke" or not same:
            counts["problems"].append([point, code, run.said[:300], again.said[:300]])
        shutil.rmtree(out, ignore_errors=True)
    return counts


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--step", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if _VARIABLE in os.environ:
            points = range(given.first, given.first + given.count * given.step, given.step)
            print(json.dumps(tried(points, Path(place))))
            return
        library = built(Path(place))
        if library is None:
            sys.exit("no C compiler")
        environment = {**os.environ, _VARIABLE: str(library), "LD_PRELOAD": str(library)}
        command = [sys.executable, "-m", "tests.crash.full_disk", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
