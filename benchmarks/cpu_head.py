"""The last product of a token: a packed lm_head against 16 bits and int8, results/cpu_head.json.

    python benchmarks/cpu_head.py

One token times a head, through the program of the embedded engine. `greedy` asks for the largest
logit alone: 16-bit heads are then read in int8 first, packed ones looked up in rough tables where
the instruction set has them. Before each product other memory is read, as a model's layers would
be. Kernels take turns; microseconds are the median and the smallest: process CPU time with one
thread, wall time with two.
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import results
import workers

SHAPES = [(49152, 576), (128256, 2048)]
SCHEMES = ["2x8g8", "2x8g4", "5x8g8", "3x8g4"]
INSTRUCTION_SETS = ["avx512-vbmi", "avx2"]
OTHER_BYTES = 48 << 20  # more than the last-level cache that a core can fill


def heads(out: int, inputs: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Products by name, and how many codes each looks up."""
    import torch

    from pvrt.format.scheme import Scheme
    from pvrt_kernels.cpu.decoder_program import Program, Rounded, Step
    from pvrt_kernels.packed import PackedWeight, aqlm_pack

    x, cache = torch.randn(1, inputs), torch.empty(1, 2, 1, 1, 1)

    def runs(name: str, weight: Any, codes: int) -> dict[str, tuple[Callable[[], Any], int]]:
        program, y = Program(), torch.empty(1, out)
        scores = None if isinstance(weight, PackedWeight) else Rounded(weight)
        program.logits(x, y, weight, torch.ones(inputs), 1e-5, scores)
        step = [Step(0, 0, cache)]
        return {
            f"{name}, all logits": (lambda: program.run(step), codes),
            f"{name}, greedy": (lambda: program.run(step, argmax_only=True), codes),
        }

    found = runs("16 bits", torch.empty(out, inputs, dtype=torch.bfloat16).normal_(), 0)
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        codes = torch.randint(-128, 128, scheme.codes_shape(out, inputs), dtype=torch.int8)
        codebooks = torch.randn(scheme.codebooks_shape).half()
        weight = aqlm_pack(codes, codebooks, torch.rand(out, 1, 1, 1).half() + 1, torch.float32)
        found.update(runs(name, weight, codes.numel()))
    return found


def measure(threads: int, rounds: int) -> list[dict[str, Any]]:
    """All heads with a number of threads, on the instruction set of PVRT_CPU_ISA."""
    import torch

    from pvrt_kernels.cpu import library

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = time.process_time if threads == 1 else time.perf_counter
    other, rows = torch.zeros(OTHER_BYTES // 8, dtype=torch.int64), []
    for out, inputs in SHAPES:
        kernels = heads(out, inputs)
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for _ in range(rounds):
            for name, (call, _) in kernels.items():
                other.sum()
                started = clock()
                call()
                times[name].append(clock() - started)
        for name, (_, codes) in kernels.items():
            usual, best = median(times[name]), min(times[name])
            row: dict[str, Any] = {"shape": f"{out}x{inputs}", "threads": threads, "head": name}
            row["instruction_set"] = library.instruction_set()
            row |= {"microseconds": round(usual * 1e6), "best_microseconds": round(best * 1e6)}
            row["best_gcodes_per_s"] = round(codes / best / 1e9, 1) if codes else None
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Run the measurement once per number of threads and instruction set."""
    options = workers.options(__doc__, rounds=21)
    if options.worker:
        print(json.dumps(measure(options.threads[0], options.rounds)))
        return
    for threads in options.threads:
        for name in INSTRUCTION_SETS:
            rows = workers.measured(__file__, threads, options.rounds, PVRT_CPU_ISA=name)
            rows = results.renewed(results.load("cpu_head"), rows, "threads", "instruction_set")
            results.store("cpu_head", rows)


if __name__ == "__main__":
    main()
