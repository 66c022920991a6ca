"""Section `correctness` of gpu.py: every scheme, type and batch against float64."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from gpu_bench import TWO_BIT, Bench, Row
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt.tools import bench_kernels
from pvrt.tools.bench_kernels import blocks_of
from pvrt_kernels import reference
from pvrt_kernels.gpu import choose, launch
from pvrt_kernels.gpu.choose import DENSE, Gpu, LaunchConfig, Shape
from pvrt_kernels.packed import PackedWeight, aqlm_packed_linear

SCHEMES = ("2x8g8", "1x16g8", "1x8g8", "4x8g8", "1x16g16", "1x8g4")
TOKENS = (1, 2, 4, 8, 16, 3, 33, 257)
INPUTS = (11008, 14336, 28672)
TYPES = (torch.float16, torch.bfloat16)
REPEATS = 5


class Check(NamedTuple):
    """A product to check; `config` is None where the library shall choose."""

    scheme: str
    dtype: torch.dtype
    tokens: int
    out: int
    features: int
    config: LaunchConfig | None = None


def checks(card: Gpu, dry: bool) -> list[Check]:
    """What matters most comes first: 2x8g8, all that can be chosen for it, then the rest."""
    tokens, inputs = ((1, 3, 9), (96,)) if dry else (TOKENS, INPUTS)
    schemes, types = (("2x8g8", "1x16g16"), TYPES[:1]) if dry else (SCHEMES, TYPES)
    found = []
    for scheme in schemes:
        for dtype in types:
            for count in tokens:
                for number, features in enumerate(inputs):
                    out = 70 if dry else 1000 + 37 * number
                    found.append(Check(scheme, dtype, count, out, features))
        if scheme == "2x8g8":
            found += other_kernels(card, dry)
    return found


def other_kernels(card: Gpu, dry: bool) -> list[Check]:
    """What no table chooses by itself: candidates of the autotuner, deterministic configs."""
    out, features = (70, 96) if dry else (4096 + 40, 4096)
    found = []
    for tokens in (1, 8) if dry else (1, 2, 4, 8, 64):
        for config in bench_kernels.candidates(card, Shape(*TWO_BIT, out, features), tokens):
            if config != DENSE:
                found.append(Check("2x8g8", torch.float16, tokens, out, features, config))
    return found


def partitions(scheme: str, out: int) -> list[int]:
    """Two for 2x8g8, else one."""
    return [out - out // 3, out // 3] if scheme == "2x8g8" else [out]


def correctness(bench: Bench) -> None:
    """Products repeated into poisoned memory: an error that moves by more than rounding is a race.

    Raises AssertionError when one is wrong, after all of them.
    """
    layer = lru_cache(maxsize=3)(partial(checked_layer, bench.device))
    wrong = []

    def check(case: Check) -> None:
        weight, exact = layer(case.scheme, case.out, case.features, case.dtype)
        x = bench.x(case.tokens, case.features, case.dtype)
        config, call = case.config, partial(aqlm_packed_linear, x, weight)
        if config is None:
            config = launch.config_for(x, blocks_of(weight))
        else:
            sizes = weight.partition_sizes
            call = partial(launch.launch, config, x, blocks_of(weight), None, sizes)
        errors = poisoned(call, x, exact, 1 if bench.dry else REPEATS)
        row = verdict(case, config, errors)
        bench.row(**row)
        if not row["passed"]:
            wrong.append(row)

    bench.each(checks(choose.describe_gpu(bench.device), bench.dry), check)
    if wrong:
        raise AssertionError(f"{len(wrong)} products are wrong, first {wrong[0]}")


def checked_layer(
    device: torch.device, scheme: str, out: int, features: int, dtype: torch.dtype
) -> tuple[PackedWeight, Tensor]:
    """A random layer and its weight in float64."""
    form, sizes = Scheme.parse(scheme), partitions(scheme, out)
    shape = form.codes_shape(out, features)
    codes = torch.randint(0, form.codebook_size, shape, device=device).to(form.code_dtype)
    codebooks = torch.randn(len(sizes), *form.codebooks_shape, device=device).to(dtype)
    scales = (torch.rand(out, 1, 1, 1, device=device) + 0.5).to(dtype)
    tensors = launch.pack(codes, codebooks, scales, sizes)
    packed = PackedWeight(launch.KERNEL.name, tensors, sizes, features)
    return packed, reference.dequantize(codes, codebooks.double(), scales.double(), sizes)


def poisoned(call: Callable[[], Tensor], x: Tensor, exact: Tensor, repeats: int) -> list[float]:
    """Relative errors of repeated products whose output memory held NaN before."""
    expected = x.double() @ exact.T
    errors = []
    for _ in range(repeats):
        poison = [torch.full_like(expected, torch.nan, dtype=x.dtype) for _ in range(8)]
        del poison  # the allocator hands memory of this size out again
        errors.append(float((call().double() - expected).norm() / expected.norm()))
    return errors


def verdict(case: Check, config: LaunchConfig, errors: list[float]) -> Row:
    """The record of one check. Rounding of a weight and of a sum bounds the error."""
    allowed = 2 * torch.finfo(case.dtype).eps
    worst, spread = max(errors), max(errors) - min(errors)
    return {
        "scheme": case.scheme,
        "dtype": str(case.dtype).removeprefix("torch."),
        "layer": [case.out, case.features],
        "tokens": case.tokens,
        "config": vars(config),
        "error": worst,
        "spread": spread,
        # One by one: a NaN is hidden by max().
        "passed": all(error < allowed for error in errors) and spread < 0.1 * allowed,
    }
