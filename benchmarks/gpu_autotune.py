"""Section `autotune` of gpu.py: which kernel and launch config, for the tables."""

from dataclasses import asdict

import torch
from gpu_bench import TWO_BIT, Bench

from pvrt.tools import bench_kernels
from pvrt_kernels.gpu.choose import LaunchConfig, Shape


def autotune(bench: Bench) -> None:
    """The fastest of all candidates per layer and number of tokens, and the rules made of them."""
    best: dict[tuple[Shape, int], LaunchConfig] = {}

    def measure(case: tuple[int, Shape]) -> None:
        tokens, shape = case
        timings = bench_kernels.measure_layer(shape, tokens, torch.float16, bench.device, True)
        best[shape, tokens] = timings[0].config
        bench.row(**asdict(shape), tokens=tokens, timings=[asdict(timing) for timing in timings])

    shapes = bench_kernels.common_layers("2x8g8")
    if bench.dry:
        shapes = [Shape(*TWO_BIT, 70, 96)]
    tokens = bench.some((1, 4, 2, 8, 16, 32, 64), (16,))
    bench.each([(count, shape) for count in tokens for shape in shapes], measure)
    bench.row(rules=bench_kernels.rules_of(best))
