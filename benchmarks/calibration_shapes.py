"""Seconds per layer at the shapes of Llama-7B, and projected hours on an A100-class GPU.

    .venv/bin/python benchmarks/calibration_shapes.py [OUTxIN:SCHEME ...]

Writes results/calibration_shapes.json; rows of cases that are not named are kept. Weights and H
are synthetic: Gaussian rows of different sizes; inputs with a decaying spectrum and log-normal
loudness per channel. Two threads, effort standard; process time (CPU seconds of both threads) and
wall time, by phase. The machine may be shared: process time is the figure.

The projection counts what the algorithm does (`work`), as it is written today: products in
float32, scores written out and read back, one kernel launch after the other.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_tune.fit.additive import AdditiveFit, codewords_scored
from pvrt_tune.settings import FitSettings, Recipe

RESULT = machine.ROOT / "benchmarks" / "results" / "calibration_shapes.json"
CASES = ("4096x4096:2x8g8", "4096x4096:1x16g8", "11008x4096:2x8g8", "4096x11008:2x8g8")
THREADS = 2
# Linears of one block of Llama-2-7B, and how many blocks.
LLAMA_7B = 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]
BLOCKS = 32

#: An A100 (40 GB) by its data sheet, and the share of it that is assumed.
PEAK_FLOPS, FLOPS_SHARE = 19.5e12, 0.6  # float32 without tensor cores
PEAK_BYTES, BYTES_SHARE = 1.555e12, 0.7
LAUNCH_SECONDS = 1e-5  # per operation started from Python
# Operations per visit of a group in assignment and sweep (profiled at two codebooks, beam 4).
LAUNCHES_PER_VISIT = 60


def layer(out: int, in_features: int) -> tuple[Tensor, Tensor]:
    """(W, H) of a synthetic layer."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.exp(0.3 * torch.randn(out, 1, generator=generator))
    weight = rows * torch.randn(out, in_features, generator=generator) / in_features**0.5
    rank = in_features // 4
    decay = torch.arange(1, rank + 1).pow(-0.5)
    mix = torch.randn(in_features, rank, generator=generator) * decay
    moment = mix @ mix.T
    moment += 0.1 * moment.diagonal().mean() * torch.eye(in_features)
    loudness = torch.exp(0.5 * torch.randn(in_features, generator=generator))
    return weight, loudness[:, None] * moment * loudness


def work(out: int, inputs: int, scheme: Scheme, settings: FitSettings) -> dict[str, Any]:
    """Floating-point operations of products with H, scores computed, and visits of a group."""
    product = 2.0 * out * inputs * inputs
    points = out * inputs / scheme.in_group_size
    books, size = scheme.num_codebooks, codewords_scored(scheme, settings)
    visit = points * size * (1 + (books - 1) * settings.beam)
    rounds, groups = settings.rounds, inputs / scheme.in_group_size
    return {
        "start": {
            "flops": 1.5 * inputs**3 + product,
            "scores": points * size * books * (settings.kmeans_iterations + 1),
            "visits": 0,
        },
        "assignment": {"flops": product, "scores": visit, "visits": groups},
        "codebooks": {
            "flops": (rounds + 1) * (settings.cg_iterations + 1) * product,
            "scores": 0,
            "visits": 0,
        },
        "scales": {"flops": (rounds + 2) * product, "scores": 0, "visits": 0},
        "sweeps": {
            "flops": 2 * rounds * product,
            "scores": rounds * visit,
            "visits": rounds * groups,
        },
    }


def measure(out: int, inputs: int, scheme: Scheme) -> dict[str, Any]:
    """Fit one layer, timing every phase."""
    weight, moment = layer(out, inputs)
    settings = Recipe().fit
    cpu = dict.fromkeys(work(out, inputs, scheme, settings), 0.0)
    wall = dict(cpu)

    def timed(phase: str, step: Callable[[], Any]) -> None:
        start = time.process_time(), time.perf_counter()
        step()
        cpu[phase] += time.process_time() - start[0]
        wall[phase] += time.perf_counter() - start[1]

    fits: list[AdditiveFit] = []

    def begin() -> None:
        generator = torch.Generator().manual_seed(0)
        fits.append(AdditiveFit(weight, moment, scheme, settings, generator))
        fits[0].start()

    timed("start", begin)
    fit = fits[0]
    timed("assignment", fit.assign_with_feedback)
    for _ in range(settings.rounds):
        timed("codebooks", fit.fit_codebooks)
        timed("scales", fit.fit_scales)
        timed("codebooks", fit.reseed_dead)
        timed("sweeps", fit.sweep)
    timed("codebooks", fit.fit_codebooks)
    timed("scales", fit.fit_scales)
    result = fit.result(torch.float16)
    return {
        "relative_error": result.relative_error,
        "cpu_seconds": sum(cpu.values()),
        "wall_seconds": sum(wall.values()),
        "cpu_seconds_by_phase": cpu,
        "work_by_phase": work(out, inputs, scheme, settings),
    }


def project(recipe: Recipe) -> dict[str, Any]:
    """Hours for Llama-2-7B on an A100-class GPU by phase, from counts alone."""
    flops, bandwidth = PEAK_FLOPS * FLOPS_SHARE, PEAK_BYTES * BYTES_SHARE
    seconds: dict[str, float] = {}
    for out, inputs in LLAMA_7B:
        scheme = Scheme.parse(recipe.scheme)
        for phase, counted in work(out, inputs, scheme, recipe.fit).items():
            # A score is written once and read once; float32.
            spent = counted["flops"] / flops + 8 * counted["scores"] / bandwidth
            spent += counted["visits"] * LAUNCHES_PER_VISIT * LAUNCH_SECONDS
            seconds[phase] = seconds.get(phase, 0) + BLOCKS * spent
    weights = BLOCKS * sum(out * inputs for out, inputs in LLAMA_7B)
    tokens = recipe.samples * recipe.length
    moments = BLOCKS * (3 * 4096**2 + 11008**2) * 2.0 * tokens  # q/k/v and gate/up share theirs
    seconds["block passes"] = (2 * 2.0 * weights * tokens + moments) / flops
    tuning = recipe.finetune
    epochs = tuning.epochs * (3 * (1 - tuning.held_out) + tuning.held_out)
    seconds["block fine-tuning"] = 2.0 * weights * tokens * epochs / flops
    return {
        "projection": f"Llama-2-7B, {recipe.scheme}, effort standard, one A100-class GPU",
        "measured": False,
        "hours": sum(seconds.values()) / 3600,
        "hours_by_phase": {phase: value / 3600 for phase, value in seconds.items()},
        "assumed": {
            "peak_flops_float32": PEAK_FLOPS,
            "share_of_peak_flops": FLOPS_SHARE,
            "peak_bytes_per_second": PEAK_BYTES,
            "share_of_peak_bytes": BYTES_SHARE,
            "seconds_per_launch": LAUNCH_SECONDS,
            "launches_per_visit_of_a_group": LAUNCHES_PER_VISIT,
            "calibration_tokens": tokens,
        },
    }


def main() -> None:
    """Measure the named cases, or all, and renew the projection."""
    torch.set_num_threads(THREADS)
    stored = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    rows = {row["case"]: row for row in stored if "case" in row}
    for case in sys.argv[1:] or CASES:
        shape, _, scheme = case.partition(":")
        out, inputs = (int(size) for size in shape.split("x"))
        row = measure(out, inputs, Scheme.parse(scheme))
        rows[case] = {
            "case": case,
            "shape": [out, inputs],
            "scheme": scheme,
            "effort": "standard",
            "threads": THREADS,
            "measured": True,
            "shared_machine": True,
            **row,
            **machine.describe(),
        }
        print(f"{case:20} {row['cpu_seconds']:7.0f} CPU s {row['wall_seconds']:7.0f} s", flush=True)
        ordered = [rows[name] for name in CASES if name in rows]
        RESULT.write_text(json.dumps([*ordered, project(Recipe())], indent=1) + "\n")
    projection = project(Recipe())
    print(f"projected: {projection['hours']:.2f} h for {projection['projection']}")


if __name__ == "__main__":
    main()
