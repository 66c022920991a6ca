"""Sections `design` and `autotune` of gpu.py: which kernel and launch config, for the tables."""

from dataclasses import asdict

import torch
from gpu_bench import TWO_BIT, Bench, rate

from pvrt.tools import bench_kernels
from pvrt.tools.bench_kernels import blocks_of, time_config, weight_copies
from pvrt_kernels.gpu import choose, launch
from pvrt_kernels.gpu.choose import LaunchConfig, Shape

LAYERS = ((4096, 4096), (22016, 4096), (1024, 4096), (28672, 8192))
#: float16 tables: the kernel for two tokens, given one.
HALF_TABLES = LaunchConfig("lut", 0, 1024, 16, 0)


def design(bench: Bench) -> None:
    """One token: candidates of the tuner, and the designs of `gpu_variants`.

    Lookups against direct decoding (from one and from several copies of the codebooks), rows per
    thread and per program, float32 against float16 tables, tables in shared memory or in L1 and
    over how many groups, Gluon where this Triton has it.
    """
    import gpu_variants  # imports Triton, which --dry-run first has to tell so

    card = choose.describe_gpu(bench.device)

    def measure(layer: tuple[int, int]) -> None:
        shape = Shape(*TWO_BIT, *layer)
        weight = bench_kernels.random_packed(shape, torch.float16, bench.device)
        copies = weight_copies(weight, 2 if bench.dry else 64)
        x = bench.x(1, shape.in_features)
        half = choose.fit(HALF_TABLES, card, shape, 2)
        for config in [*bench_kernels.candidates(card, shape, 1), half]:
            if bench.dry and (config.kernel == "lut_gluon" or config.rows > 512):
                continue
            seconds = time_config(bench.clock, config, x, copies)
            bench.row(**rate(bench, shape, vars(config), seconds))
        exact = launch.multiply_decoded(x, blocks_of(weight), None, weight.partition_sizes).double()
        for name, calls in gpu_variants.variants(card, x, copies):
            error = float((calls[0]().double() - exact).norm() / exact.norm())
            bench.row(**rate(bench, shape, name, bench.clock.time(calls)), error=error)
            if not error < 4 * torch.finfo(x.dtype).eps:
                raise AssertionError(f"{name} is wrong: {error}")

    bench.each(bench.some(LAYERS, ((70, 96),)), measure)


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
