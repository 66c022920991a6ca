"""Mutants tried one after the other in a process that may crash, hang or fill its memory.

A mutant is refused (one sentence, a PvrtError), accepted rightly, or a fault: a traceback, a crash
of the process, a hang, or accepted although it should not be.
"""

import faulthandler
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import psutil  # type: ignore[import-untyped]

from pvrt.errors import PvrtError

CPU_SECONDS = 30  # that no mutant takes unless it hangs
SECONDS = 600  # the same, asleep or on a busy machine
MEMORY = 12 << 30  # of address space, most of which is never touched
LONGEST = 4000  # characters of a sentence


class WronglyAccepted(Exception):
    """A mutant that should have been refused was not."""


class Kind(Protocol):
    """A kind of input: makes mutants, and hands them to the readers that users have."""

    def __init__(self, place: Path) -> None:
        """Make sound inputs in a folder."""

    def mutant(self, seed: int, folder: Path) -> str:
        """Write a mutant into an empty folder; says what was done to it."""

    def read(self, folder: Path) -> None:
        """Hand it to the readers. Raises PvrtError where they refuse it, and WronglyAccepted."""


@dataclass
class Counts:
    """What became of mutants, and those that show a fault: (seed, outcome, what was said)."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, seed: int, outcome: str, said: str) -> None:
        """Count one."""
        self.outcomes[outcome] += 1
        if outcome not in ("refused", "accepted"):
            self.faults.append((seed, outcome, said))


def run(kind: type[Kind], seeds: Iterable[int]) -> Counts:
    """Try mutants of a kind in child processes; one that dies costs the mutant at work."""
    counts, left = Counts(), list(seeds)
    with tempfile.TemporaryDirectory() as place:
        made = kind(Path(place) / "seeds")
        while left:
            done = 0
            for seed, outcome, said in _batch(made, left, Path(place) / "work"):
                counts.add(seed, outcome, said)
                done += 1
            left = left[done:]
    return counts


def _batch(kind: Kind, seeds: list[int], work: Path) -> Iterator[tuple[int, str, str]]:
    """Results in the order of the seeds, up to the first that ends the process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(kind, seeds, work, (here, there)))
    child.start()
    there.close()
    try:
        for seed in seeds:
            try:
                if (over := _over(here, child.pid)) is not None:
                    child.kill()
                    yield seed, "hang", over
                    return
                yield (seed, *here.recv())
            except EOFError:
                child.join()
                yield seed, "crash", f"exit code {child.exitcode}"
                return
    finally:
        here.close()
        child.join(10)
        child.kill()


def _over(results: Connection, pid: int | None) -> str | None:
    """What is over that a mutant may take; None once there is a result."""
    process, end = psutil.Process(pid), time.monotonic() + SECONDS
    before = sum(process.cpu_times()[:2])
    while not results.poll(0.5):
        if time.monotonic() > end:
            return f"more than {SECONDS} s"
        if sum(process.cpu_times()[:2]) > before + CPU_SECONDS:
            return f"more than {CPU_SECONDS} CPU seconds"
    return None


def _work(kind: Kind, seeds: list[int], work: Path, pipe: tuple[Connection, Connection]) -> None:
    theirs, results = pipe
    theirs.close()  # so that nothing can be sent once the parent is gone
    # A signal ends it at once: handlers of the parent's libraries may wait for threads that a fork
    # does not have.
    faulthandler.disable()
    for fatal in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
        signal.signal(fatal, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115 (as long as the process)
    for seed in seeds:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        results.send(outcome(kind, seed, work))


def outcome(kind: Kind, seed: int, folder: Path) -> tuple[str, str]:
    """What becomes of one mutant, and what was said."""
    done = kind.mutant(seed, folder)
    try:
        kind.read(folder)
    except WronglyAccepted as error:
        return "wrongly accepted", f"{done}: {error}"
    except PvrtError as error:
        said = str(error)
        if "\n" in said or not said or len(said) > LONGEST:
            return "traceback", f"{done}: no sentence: {said[:500]!r}"
        return "refused", said
    except BaseException:
        return "traceback", f"{done}: {traceback.format_exc()[-1500:]}"
    return "accepted", done
