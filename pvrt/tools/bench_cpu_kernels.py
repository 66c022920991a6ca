"""Measuring CPU kernels: `pvrt bench kernels --cpu`.

A layer in every instruction set that this CPU has, packed as it serves, for one token to a prompt.
Times are of this process's CPU with one thread, which other work on the machine barely disturbs,
and wall times with more; the median of repeats.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pvrt.errors import RunError
from pvrt.format.aqlm import Checkpoint
from pvrt.tools.bench_kernels import common_layers, fused_layers, random_layer, weight_copies
from pvrt_kernels.cpu import library
from pvrt_kernels.cpu.products import bfloat16_products, multiplies_bfloat16
from pvrt_kernels.gpu.choose import Shape
from pvrt_kernels.packed import PackedWeight, aqlm_pack, aqlm_packed_linear

TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
_COLD_BYTES = 48 << 20  # more than the last-level cache that a core can fill
_MOST_COPIES = 16
_SECONDS = 0.2  # of repeats


def run(path: Path | None, scheme: str, say: Callable[[str], None]) -> list[Any]:
    """Measure the layers of a checkpoint, or common ones of a scheme.

    Returns a record per layer, instruction set and number of tokens, in microseconds. The first
    instruction set is what serves. `bfloat16` says whether prompts may be rounded to it, as the
    embedded engine lets them. Raises RunError where the C library was not built.
    """
    if library.library() is None:
        raise RunError(f"there are no CPU kernels: {library.REMEDY}")
    layers = common_layers(scheme) if path is None else fused_layers(Checkpoint.open(path))
    serves, threads = library.instruction_set(), torch.get_num_threads()
    say(f"{serves} serves here, {threads} thread{'s' * (threads > 1)}; us by number of tokens")
    say(f"{'layer':>14}  {'kernel':24}" + "".join(f"{tokens:>9}" for tokens in TOKENS))
    records: list[dict[str, Any]] = []
    for shape in layers:
        weights = _copies(shape)
        for name in library.usable_instruction_sets():
            with library.using(name):
                for bfloat16 in (False, True) if multiplies_bfloat16() else (False,):
                    times = dict(zip(TOKENS, _times(weights, bfloat16), strict=True))
                    kernel = f"{shape.scheme} {name}{', bf16' * bfloat16}"
                    layer = f"{shape.out_features:>6} x {shape.in_features:<5}"
                    say(f"{layer}  {kernel:24}" + "".join(f"{t:9.0f}" for t in times.values()))
                    records += (
                        {
                            "scheme": shape.scheme,
                            "out_features": shape.out_features,
                            "in_features": shape.in_features,
                            "isa": name,
                            "bfloat16": bfloat16,
                            "tokens": tokens,
                            "threads": threads,
                            "microseconds": round(microseconds, 1),
                        }
                        for tokens, microseconds in times.items()
                    )
    return records


def _copies(shape: Shape) -> list[PackedWeight]:
    """A random weight, as often as it takes that none is still in the cache at its next turn."""
    codes, codebooks, scales = random_layer(shape, torch.float16, torch.device("cpu"))
    weight = aqlm_pack(codes, codebooks, scales.view(-1, 1, 1, 1), torch.float32)
    assert weight is not None
    return weight_copies(weight, _MOST_COPIES, _COLD_BYTES)


def _times(weights: list[PackedWeight], bfloat16: bool) -> Iterator[float]:
    """Microseconds of a product, by number of tokens."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode(), bfloat16_products() if bfloat16 else nullcontext():
        for tokens in TOKENS:
            x, end = torch.randn(tokens, weights[0].in_features), 0.0
            seconds: list[float] = []
            while not seconds or time.perf_counter() < end:
                for weight in weights:
                    started = clock()
                    aqlm_packed_linear(x, weight)
                    seconds.append(clock() - started)
                end = end or time.perf_counter() + _SECONDS  # the first turn warms up
            yield 1e6 * median(seconds[len(weights) :] or seconds)
