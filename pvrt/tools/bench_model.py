"""Tokens per second of one request at a time: prefill and decode, medians of repeats.

Also how near decoding comes to the speed of memory, which bounds it: a token reads every weight
once.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch


class Generator(Protocol):
    """What is measured: yields one item per generated token, `count` in all."""

    def __call__(self, prompt_ids: Sequence[int], count: int) -> Iterator[object]: ...


@dataclass(frozen=True)
class Memory:
    """Weights read per token, what a measurement of memory reads, and the share of that."""

    bytes_per_token: int
    bytes_per_second: float
    bandwidth_fraction: float


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats` runs. ttft_seconds is the time to the first token, joules_per_token
    the mean of all runs for a new token, prompts included.
    """

    prompt_tokens: int
    new_tokens: int
    repeats: int
    ttft_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_spread: tuple[float, float]
    joules_per_token: float | None = None


def measure(
    generate: Generator,
    prompt_ids: Sequence[int],
    new_tokens: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    energy: Callable[[], float] | None = None,
) -> Speed:
    """Time `repeats` runs after one warm-up. Decode counts the tokens after the first one.

    clock counts seconds, energy joules.
    """
    if new_tokens < 2 or repeats < 1:
        raise ValueError("a measurement needs at least 2 new tokens and 1 repeat")
    first, rates, used = [], [], 0.0
    for run in range(repeats + 1):
        started = clock()
        stamps = [clock() for _ in generate(prompt_ids, new_tokens)]
        if len(stamps) < 2:
            raise RuntimeError("the engine generated fewer than 2 tokens")
        if run:
            first.append(stamps[0] - started)
            rates.append((len(stamps) - 1) / (stamps[-1] - stamps[0]))
        elif energy is not None:
            used = energy()
    ttft = median(first)
    return Speed(
        prompt_tokens=len(prompt_ids),
        new_tokens=new_tokens,
        repeats=repeats,
        ttft_seconds=ttft,
        prefill_tokens_per_second=len(prompt_ids) / ttft,
        decode_tokens_per_second=median(rates),
        decode_spread=(min(rates), max(rates)),
        joules_per_token=None if energy is None else (energy() - used) / (repeats * new_tokens),
    )


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
