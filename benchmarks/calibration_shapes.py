"""Seconds per layer at the shapes of Llama-7B: writes results/calibration_shapes.json.

    .venv/bin/python benchmarks/calibration_shapes.py [OUTxIN:SCHEME ...]

Rows of cases that are not named are kept. Weights and H are synthetic: Gaussian rows of different
sizes; inputs with a decaying spectrum and a log-normal size per channel. Two threads, effort
standard; process time (CPU seconds of both threads), for the machine may be shared.
"""

import sys
import time

import machine
import results
import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.settings import Recipe

CASES = ("4096x4096:2x8g8", "11008x4096:2x8g8", "4096x11008:2x8g8")
THREADS = 2


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
    sizes = torch.exp(0.5 * torch.randn(in_features, generator=generator))
    return weight, sizes[:, None] * moment * sizes


def main() -> None:
    """Measure the named cases, or all."""
    torch.set_num_threads(THREADS)
    for case in sys.argv[1:] or CASES:
        shape, _, scheme = case.partition(":")
        out, inputs = (int(size) for size in shape.split("x"))
        problem, generator = layer(out, inputs), torch.Generator().manual_seed(0)
        started = time.process_time()
        parsed = Scheme.parse(scheme)
        fit = fit_layer(*problem, parsed, Recipe().fit, generator).result(torch.float16)
        row = {
            "case": case,
            "shape": [out, inputs],
            "scheme": scheme,
            "effort": "standard",
            "threads": THREADS,
            "relative_error": fit.relative_error,
            "cpu_seconds": time.process_time() - started,
            "shared_machine": True,
            **machine.describe(),
        }
        print(f"{case:20} {row['cpu_seconds']:7.0f} CPU s", flush=True)
        rows = results.renewed(results.load("calibration_shapes"), [row], "case")
        results.store("calibration_shapes", rows)


if __name__ == "__main__":
    main()
