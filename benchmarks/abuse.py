"""Hostile requests to servers at work, both engines -> the key `abuse` of results/reliability.json.

    python benchmarks/abuse.py [--engines local vllm] [--only "itself: format"]

Every request of tests/server/abuse.py is sent to `pvrt serve` of a toy checkpoint, one after the
other. Counted are the CPU seconds of the server and all that it started, until nothing of it is at
work any more. At the end the server is told to go while it is busy.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import machine
import processes
import psutil  # type: ignore[import-untyped]
import results
import serving

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures.toy import write_toy
from tests.server import abuse

_PATIENCE = 600.0  # seconds, on a machine that is busy with other things
_BUSY = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}
FLAGS = {"local": [], "vllm": ["--", "--enforce-eager", "--max-num-seqs", "8"]}


@dataclass(frozen=True)
class Tried:
    """A request: the status of its answer (0 for what is no request), and CPU seconds."""

    name: str
    status: int
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether it was neither answered nor refused, or cost too much."""
        return self.status >= 500 or self.seconds > abuse.CPU_SECONDS


def at_work(process: psutil.Process) -> bool:
    """Whether any thread of a family can run now."""
    for member in processes.family(process):
        for state in Path(f"/proc/{member.pid}/task").glob("*/stat"):
            with suppress(OSError):  # gone by now
                if state.read_text().rpartition(")")[2].split()[0] == "R":
                    return True
    return False


def settle(process: psutil.Process) -> None:
    """Return once a family has been idle for a quarter of a second."""
    quiet, end = 0, time.monotonic() + _PATIENCE
    while quiet < 10 and time.monotonic() < end:
        quiet = 0 if at_work(process) else quiet + 1
        time.sleep(0.025)


def measured(process: psutil.Process, name: str, ask: Callable[[], int], parts: int = 1) -> Tried:
    """Send, wait for the end of all that comes of it, and count."""
    before = processes.cpu_seconds(process)
    try:
        status = ask()
    except httpx.HTTPError as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        status = 599
    settle(process)
    tried = Tried(name, status, (processes.cpu_seconds(process) - before) / parts)
    mark = "FAIL" if tried.failed else "ok"
    print(f"{mark:5} {name:45} {status:4} {tried.seconds:6.2f} CPU s", flush=True)
    return tried


def all_of(url: str, process: psutil.Process, only: str | None) -> Iterator[Tried]:
    """Every request and trick; the last one ends the server."""

    def posted(path: str, body: dict[str, Any]) -> int:
        return httpx.post(f"{url}{path}", json=body, timeout=_PATIENCE).status_code

    def health() -> int:
        return httpx.get(f"{url}/health", timeout=_PATIENCE).status_code

    posted(abuse.COMPLETIONS, {"prompt": "a", "max_tokens": 2})  # what the first one loads
    settle(process)
    for name, (path, body) in abuse.everything().items():
        if only in (None, name):
            yield measured(process, name, lambda path=path, body=body: posted(path, body))  # type: ignore[misc]
            assert health() == 200
    for name, (trick, parts) in abuse.TRICKS.items():
        if only in (None, name):

            def done(trick: Callable[[str], None] = trick) -> int:
                trick(url)
                return 0

            yield measured(process, name, done, parts)
            assert health() == 200
    yield ended(url, process)


def ended(url: str, process: psutil.Process) -> Tried:
    """SIGTERM while eight streams are read, whose cost until they end is in it."""

    def stream() -> None:
        with suppress(httpx.HTTPError):
            httpx.post(f"{url}{abuse.COMPLETIONS}", json=_BUSY, timeout=_PATIENCE)

    members = processes.family(process)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream) for _ in range(8)]
        while not at_work(process) and not all(one.done() for one in streams):
            time.sleep(0.01)

        def stop() -> int:
            os.kill(process.pid, signal.SIGTERM)
            end = time.monotonic() + _PATIENCE
            while any(map(alive, members)):
                if time.monotonic() > end:
                    return 599
                time.sleep(0.05)
            return 0

        return measured(process, "SIGTERM while it is busy", stop, 8)


def alive(process: psutil.Process) -> bool:
    """Whether a process is there and not only to be waited for."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def summary(tried: list[Tried]) -> dict[str, Any]:
    """What the result file says of one engine."""
    slowest = max(tried, key=lambda one: one.seconds)
    return {
        "tried": len(tried),
        "answered": sum(one.status in range(200, 300) for one in tried),
        "refused": sum(one.status in range(400, 500) for one in tried),
        "median_cpu_seconds": round(statistics.median(one.seconds for one in tried), 3),
        "slowest": [slowest.name, round(slowest.seconds, 2)],
        "failed": [[one.name, one.status, round(one.seconds, 2)] for one in tried if one.failed],
    }


def abused(engine: str, only: str | None) -> dict[str, Any]:
    """Serve a toy, send everything, and what came of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "toy"
        write_toy(folder)
        flags = ["--log-level", "error", "--dtype", "float32", *FLAGS[engine]]
        port = serving.free_port()
        with serving.running(serving.pvrt(folder, port, engine, *flags), port) as server:
            return summary(list(all_of(server.url, psutil.Process(server.pid), only)))


def main() -> None:
    """Serve, send, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=list(FLAGS), default=list(FLAGS))
    parser.add_argument("--only")
    given = parser.parse_args()
    found = {engine: abused(engine, given.only) for engine in given.engines}
    print(json.dumps(found, indent=1))
    if given.only is None:
        before = results.load("reliability") or {}
        results.store("reliability", {**before, "abuse": {**before.get("abuse", {}), **found}})
    sys.exit(any(each["failed"] for each in found.values()))


if __name__ == "__main__":
    main()
