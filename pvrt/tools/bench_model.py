"""Tokens per second of one request at a time, in llama-bench's tests: medians of repeats.

Also how near decoding comes to the speed of memory, which bounds it: a token reads every weight
once.

A rate is of a whole run, from its request to its last token: tokens that arrive in bursts, because
the reader was not awake, make no run shorter.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch


class Generator(Protocol):
    """What is measured: yields one item per generated token, `count` in all."""

    def __call__(self, prompt_ids: Sequence[int], count: int) -> Iterator[object]: ...


@dataclass(frozen=True)
class Case:
    """So many tokens of a prompt are read, or of an answer written, after `depth` others."""

    prompt: int = 0
    new: int = 0
    depth: int = 0

    def __str__(self) -> str:
        """The name that llama-bench gives it."""
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.new}"
        return f"{name} @ d{self.depth}" if self.depth else name


@dataclass(frozen=True)
class Memory:
    """Weights read per token, what a measurement of memory reads, and the share of that."""

    bytes_per_token: int
    bytes_per_second: float
    bandwidth_fraction: float


@dataclass(frozen=True)
class Speed:
    """A test's runs. seconds: of every run. waits: until the first token in a test of a prompt,
    else from each token to the next as they come. joules_per_token: the mean of all runs.
    """

    test: Case
    seconds: list[float]
    waits: list[float]
    joules_per_token: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the median run."""
        return self.rate(0.5)

    def rate(self, share: float) -> float:
        """Tokens per second that this share of the runs do not reach."""
        tokens = self.test.prompt or self.test.new
        return tokens / percentile(self.seconds, 1 - share)

    def wait(self, share: float) -> float:
        """Seconds that this share of the waits are not longer than."""
        return percentile(self.waits, share)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed, between two neighbours in proportion."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = int(place)
    return ranked[low] + (place - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])


def measure(
    generate: Generator,
    test: Case,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    energy: Callable[[], float] | None = None,
) -> Speed:
    """Time `repeats` runs after one warm-up.

    All begin with the same `depth` tokens, which the generator should have kept since the warm-up,
    and go on with others each. clock counts seconds, energy joules.
    """
    length, count = (test.prompt, 1) if test.prompt else (1, test.new)
    before = [1 + i % 200 for i in range(test.depth)]
    turns = itertools.count(1)

    def run() -> tuple[float, list[float]]:
        turn = next(turns)
        asked = before + [1 + (i + turn) % 200 for i in range(length)]
        started = clock()
        stamps = [clock() for _ in generate(asked, count)]
        if len(stamps) != count:
            raise RuntimeError(f"the engine generated {len(stamps)} tokens of {count}")
        return stamps[-1] - started, [later - earlier for earlier, later in pairwise(stamps)]

    run()
    used = 0.0 if energy is None else energy()
    runs = [run() for _ in range(repeats)]
    joules = None
    if energy is not None:
        joules = (energy() - used) / (repeats * (test.prompt or test.new))
    seconds = [taken for taken, _ in runs]
    waits = [gap for _, gaps in runs for gap in gaps] or seconds
    return Speed(test, seconds, waits, joules)


def memory(tokens_per_second: float, bytes_per_token: int, device: torch.device) -> Memory | None:
    """How much of a device's measured bandwidth a rate uses; None where nothing measures it.

    That of a CPU is of reading, that of a GPU of copying, bytes read and written together.
    """
    if device.type == "cuda":
        from pvrt.tools.bench_kernels import copy_bandwidth

        found = copy_bandwidth(device)
    else:
        from pvrt_kernels.cpu import library

        if device.type != "cpu" or library.library() is None:
            return None
        found = library.read_bandwidth()
    return Memory(bytes_per_token, found, tokens_per_second * bytes_per_token / found)
