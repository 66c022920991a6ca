"""All that is to be known of a GPU, in one call of under ten minutes: writes results/gpu_*.json.

    .venv/bin/python benchmarks/gpu.py                  # checks first, then times; a table last
    .venv/bin/python benchmarks/gpu.py --only ceilings correctness gemv
    .venv/bin/python benchmarks/gpu.py --dry-run        # Triton's interpreter, tiny shapes, no GPU

Needs torch, Triton, safetensors and this repository (installed, or PYTHONPATH=.:kernels:tune), no
network. The `aqlm` package is measured beside ours where it can be imported; compute-sanitizer and
ncu run where they are installed. Sections that time does not suffice for are named in the result,
as is every failure.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_llama
import machine
import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt.tools import bench_kernels
from pvrt.tools.bench_kernels import Clock, blocks_of, time_config, weight_copies
from pvrt_kernels import reference
from pvrt_kernels.gpu import choose, launch
from pvrt_kernels.gpu.choose import DENSE, LaunchConfig, Shape
from pvrt_kernels.packed import PackedWeight, aqlm_packed_linear

TWO_BIT = (2, 256, 8)
SCHEMES = ("2x8g8", "1x16g8", "1x16g16", "1x8g8", "1x8g4", "4x8g8")
GEMV_SHAPES = (
    *((4096, 4096), (6144, 4096), (11008, 4096), (22016, 4096)),
    *((4096, 11008), (1024, 4096), (28672, 8192), (8192, 28672)),
)
Row = dict[str, Any]


@dataclass
class Bench:
    """The device, how much to do on it, and what was found."""

    device: torch.device
    dry: bool
    deadline: float
    results: Row = field(default_factory=dict)

    @property
    def clock(self) -> Clock:
        """For medians on this device."""
        return Clock(self.device)

    def late(self, section: str) -> bool:
        """Whether time is up; the section is then named as cut short."""
        if time.monotonic() < self.deadline:
            return False
        self.results["failures"][section] = "cut short: no time left"
        return True

    @property
    def copy_rate(self) -> float:
        """Measured bytes per second, read and written."""
        return float(self.results["ceilings"]["copy_bytes_per_second"])

    def some(self, real: tuple[Any, ...], tiny: tuple[Any, ...]) -> tuple[Any, ...]:
        """What to measure: the real shapes, or tiny ones in a dry run."""
        return tiny if self.dry else real

    def x(self, tokens: int, features: int, dtype: torch.dtype = torch.float16) -> Tensor:
        """Random activations."""
        return torch.randn(tokens, features, device=self.device).to(dtype)


def ceilings(bench: Bench) -> Row:
    """Copy bandwidth and the rate of cuBLAS in float16."""
    n = 64 if bench.dry else 8192
    a = bench.x(n, n)
    seconds = bench.clock.time([lambda: a @ a])
    rate = bench_kernels.copy_bandwidth(bench.device)
    return {"copy_bytes_per_second": rate, "gemm_flops_per_second": 2 * n**3 / seconds}


def correctness(bench: Bench) -> list[Row]:
    """Every scheme, type and batch against float64, ten times into poisoned memory.

    An error that moves by more than rounding between runs is a race.
    """
    tokens = bench.some((1, 2, 3, 4, 8, 16, 33, 257), (1, 3, 9))
    inputs = bench.some((11008, 14336, 28672), (96,))
    rows: list[Row] = []
    for scheme in bench.some(SCHEMES, ("2x8g8", "1x16g16")):
        for dtype in bench.some((torch.float16, torch.bfloat16), (torch.float16,)):
            for number, features in enumerate(inputs):
                out = 70 if bench.dry else 1000 + 37 * number
                layer, exact = checked_layer(bench, scheme, out, features, dtype)
                for count in tokens:
                    x = bench.x(count, features, dtype)
                    errors = poisoned(bench, partial(aqlm_packed_linear, x, layer), x, exact)
                    config = launch.config_for(x, blocks_of(layer))
                    rows.append(verdict(scheme, dtype, [out, features], count, config, errors))
    rows += other_kernels(bench)
    bad = [row for row in rows if not row["passed"]]
    if bad:
        raise AssertionError(f"{len(bad)} of {len(rows)} wrong, first {bad[0]}")
    return rows


def other_kernels(bench: Bench) -> list[Row]:
    """What no table chooses by itself: candidates of the autotuner, deterministic configs."""
    rows: list[Row] = []
    shape = Shape(*TWO_BIT, *bench.some((4096 + 40, 4096), (70, 96)))
    layer, exact = checked_layer(
        bench, "2x8g8", shape.out_features, shape.in_features, torch.float16
    )
    card = choose.describe_gpu(bench.device)
    for tokens in bench.some((1, 2, 4, 8, 64), (1, 8)):
        x = bench.x(tokens, shape.in_features)
        for config in bench_kernels.candidates(card, shape, tokens):
            if config == DENSE or (bench.dry and config.kernel == "lut_gluon"):
                continue
            call = partial(launch.launch, config, x, blocks_of(layer), None, layer.partition_sizes)
            errors = poisoned(bench, call, x, exact)
            sizes = [shape.out_features, shape.in_features]
            rows.append(verdict("2x8g8", torch.float16, sizes, tokens, config, errors))
    return rows


def checked_layer(
    bench: Bench, scheme: str, out: int, features: int, dtype: torch.dtype
) -> tuple[PackedWeight, Tensor]:
    """A random layer, of two partitions for 2x8g8, and its weight in float64."""
    form = Scheme.parse(scheme)
    sizes = [out - out // 3, out // 3] if scheme == "2x8g8" else [out]
    shape = form.codes_shape(out, features)
    codes = torch.randint(0, form.codebook_size, shape, device=bench.device).to(form.code_dtype)
    codebooks = torch.randn(len(sizes), *form.codebooks_shape, device=bench.device).to(dtype)
    scales = (torch.rand(out, 1, 1, 1, device=bench.device) + 0.5).to(dtype)
    kernel = launch.kernel_for(form.num_codebooks)
    tensors = kernel.pack(codes, codebooks, scales, sizes)
    packed = PackedWeight(kernel.name, tensors, sizes, features)
    return packed, reference.dequantize(codes, codebooks.double(), scales.double(), sizes)


def poisoned(bench: Bench, call: Callable[[], Tensor], x: Tensor, exact: Tensor) -> list[float]:
    """Relative errors of repeated products whose output memory held NaN before."""
    expected = x.double() @ exact.T
    errors = []
    for _ in range(1 if bench.dry else 10):
        poison = torch.full((1 << (10 if bench.dry else 24),), torch.nan, device=bench.device)
        del poison
        errors.append(float((call().double() - expected).norm() / expected.norm()))
    return errors


def verdict(
    scheme: str,
    dtype: torch.dtype,
    layer: list[int],
    tokens: int,
    config: LaunchConfig,
    errors: list[float],
) -> Row:
    """The record of one check. Rounding of a weight and of a sum bounds the error."""
    allowed = 2 * torch.finfo(dtype).eps
    worst, spread = max(errors), max(errors) - min(errors)
    return {
        "scheme": scheme,
        "dtype": str(dtype).removeprefix("torch."),
        "layer": layer,
        "tokens": tokens,
        "config": vars(config),
        "error": worst,
        "spread": spread,
        "passed": worst < allowed and spread < 0.1 * allowed,
    }


def gemv(bench: Bench) -> list[Row]:
    """Decoding, 1 and 4 tokens: ours, cuBLAS float16 and the aqlm package in one run."""
    peers = aqlm_kernels() if bench.device.type == "cuda" else {}
    rows: list[Row] = []
    for shape in [Shape(*TWO_BIT, *s) for s in bench.some(GEMV_SHAPES, ((70, 96),))]:
        copies = weight_copies(
            bench_kernels.random_packed(shape, torch.float16, bench.device), 2 if bench.dry else 64
        )
        for tokens in bench.some((1, 4), (1,)):
            if bench.late("gemv"):
                return rows
            x = bench.x(tokens, shape.in_features)
            config = launch.config_for(x, blocks_of(copies[0]))
            seconds = time_config(bench.clock, config, x, copies)
            dense = bench_kernels.time_dense(bench.clock, x, shape)
            row = rate(bench, shape, vars(config), seconds)
            row |= {"tokens": tokens, "over_cublas_fp16": dense / seconds}
            for name, kernel in peers.items():
                row[f"over_{name}"] = time_peer(bench, kernel, x, copies) / seconds
            rows.append(row)
    return rows


def aqlm_kernels() -> dict[str, Callable[..., Tensor]]:
    """The kernels of the public package, where it is installed and nvcc builds it."""
    found: dict[str, Callable[..., Tensor]] = {}
    try:
        package = "aqlm.inference_kernels"
        select = importlib.import_module(f"{package}.kernel_selector").get_forward_pass_kernel
        codebooks = torch.empty(2, 256, 1, 8, device="cuda")
        found["aqlm_triton"] = importlib.import_module(f"{package}.triton_kernel").triton_matmul
        found["aqlm_cuda"] = select(codebooks, optimize_for_training=False)
    except Exception as error:  # a missing package, compiler or header is a result too
        print(f"aqlm: {type(error).__name__}: {str(error).splitlines()[0]}")
    return found


def time_peer(
    bench: Bench, kernel: Callable[..., Tensor], x: Tensor, copies: list[PackedWeight]
) -> float:
    """Seconds of the aqlm package's product with the same weights."""
    calls = []
    for weight in copies:
        codes, codebooks, scales = weight.unpack()
        calls.append(partial(kernel, x, codes, codebooks[0], scales, None))
    return bench.clock.time(calls)


def design(bench: Bench) -> list[Row]:
    """Which kernel, tile and split for one token: candidates of the tuner, and `gpu_variants`.

    Lookups against direct decoding (from one and from several copies of the codebooks), rows per
    thread and per program, float32 against float16 tables (the kernel for two tokens, given one),
    tables in shared memory or in L1 and over how many groups, Gluon where this Triton has it.
    """
    import gpu_variants  # imports Triton, which --dry-run first has to tell so

    card = choose.describe_gpu(bench.device)
    rows: list[Row] = []
    layers = bench.some(((4096, 4096), (11008, 4096), (1024, 4096), (28672, 8192)), ((70, 96),))
    for shape in [Shape(*TWO_BIT, *layer) for layer in layers]:
        weight = bench_kernels.random_packed(shape, torch.float16, bench.device)
        copies = weight_copies(weight, 2 if bench.dry else 64)
        x = bench.x(1, shape.in_features)
        tried = bench_kernels.candidates(card, shape, 1)
        half = choose.fit(LaunchConfig("lut", 0, 1024, 16, 0), card, shape, 2)  # float16 tables
        for config in [*tried, half]:
            if bench.dry and (config.kernel == "lut_gluon" or config.rows > 512):
                continue
            if bench.late("design"):
                return rows
            seconds = time_config(bench.clock, config, x, copies)
            rows.append(rate(bench, shape, vars(config), seconds))
        exact = launch.multiply_decoded(x, blocks_of(weight), None, weight.partition_sizes).double()
        for name, calls in gpu_variants.variants(card, x, copies):
            if bench.late("design"):
                return rows
            error = float((calls[0]().double() - exact).norm() / exact.norm())
            rows.append(rate(bench, shape, name, bench.clock.time(calls)) | {"error": error})
            if error > 4 * torch.finfo(x.dtype).eps:
                raise AssertionError(f"{name} is wrong: {error}")
    return rows


def rate(bench: Bench, shape: Shape, config: Row, seconds: float) -> Row:
    """The record of a design's time."""
    read = shape.blocks * 16 * shape.out_features
    return {
        "layer": [shape.out_features, shape.in_features],
        "config": config,
        "microseconds": seconds * 1e6,
        "code_bytes_per_second": read / seconds,
        "of_copy_bandwidth": read / seconds / bench.copy_rate,
    }


def crossover(bench: Bench) -> list[Row]:
    """Batches 2 to 512 under every kernel that takes them: the rules of a table."""
    card = choose.describe_gpu(bench.device)
    rows: list[Row] = []
    layers = bench.some(((4096, 4096), (22016, 4096), (4096, 11008)), ((70, 96),))
    for scheme in bench.some((TWO_BIT, (1, 65536, 8)), (TWO_BIT,)):
        for shape in [Shape(*scheme, *layer) for layer in layers]:
            weight = bench_kernels.random_packed(shape, torch.float16, bench.device)
            copies = weight_copies(weight, 2 if bench.dry else 16)
            for tokens in bench.some((2, 4, 8, 16, 32, 64, 128, 256, 512), (8,)):
                if bench.late("crossover"):
                    return rows
                x = bench.x(tokens, shape.in_features)
                dense = bench_kernels.time_dense(bench.clock, x, shape)
                for config in bench_kernels.candidates(card, shape, tokens):
                    seconds = time_config(bench.clock, config, x, copies)
                    row = rate(bench, shape, vars(config), seconds)
                    row |= {"tokens": tokens, "over_cublas_fp16": dense / seconds}
                    rows.append({"scheme": shape.scheme, **row})
    return rows


def model(bench: Bench) -> list[Row]:
    """Tokens per second of whole decoding steps at 1k tokens of context, against float16."""
    rows: list[Row] = []
    for llama in bench.some((gpu_llama.LLAMA2_7B, gpu_llama.LLAMA3_8B), (gpu_llama.TINY,)):
        seconds = {}
        for name, scheme in (("2x8g8", TWO_BIT), ("float16", None)):
            need = 3e9 if scheme else 18e9
            if not bench.dry and torch.cuda.mem_get_info()[0] < need:
                continue
            step = gpu_llama.DecodeStep(llama, scheme, 1024, torch.float16, bench.device)
            seconds[name] = bench.clock.time([step])
            rows.append(
                {
                    "model": llama.name,
                    "weights": name,
                    "tokens_per_second": 1 / seconds[name],
                    "of_copy_bandwidth": step.bytes / seconds[name] / bench.copy_rate,
                }
            )
            del step
        if len(seconds) == 2:
            rows[-2]["over_float16"] = seconds["float16"] / seconds["2x8g8"]
    return rows


def tuning(bench: Bench) -> Row:
    """Seconds to calibrate a layer, and of one PV step of a 1B-shaped model, with its memory."""
    from pvrt.modules.aqlm_linear import AQLMLinear
    from pvrt_tune.fit.additive import fit_layer
    from pvrt_tune.pv.optimizer import PVOptimizer
    from pvrt_tune.pv.representation import AdditiveRepresentation
    from pvrt_tune.settings import FitSettings, PVSettings

    scheme = Scheme.parse("2x8g8")
    found: Row = {}
    settings = FitSettings(rounds=1, kmeans_iterations=2) if bench.dry else FitSettings()
    for out, features in bench.some(((4096, 4096), (11008, 4096)), ((64, 64),)):
        weight, x = bench.x(out, features).float(), bench.x(4 * features, features).float()
        generator = torch.Generator().manual_seed(0)
        started = time.perf_counter()
        fit = fit_layer(weight, x.T @ x / len(x), scheme, settings, generator).result(torch.float16)
        seconds = time.perf_counter() - started
        found[f"{out}x{features}"] = {"seconds": seconds, "relative_error": fit.relative_error}
    llama = gpu_llama.TINY
    if not bench.dry:
        llama = gpu_llama.Llama("1B shape", 2048, 8192, 16, 32, 8, 128256, head=64)
    weights, layers = {}, {}
    for number in range(llama.layers):
        for name, (out, features) in enumerate(llama.linears):
            layer = AQLMLinear(features, out, scheme, dtype=torch.float16, device=bench.device)
            layer.codes.random_(-128, 127)
            layer.codebooks.data.normal_()
            layer.scales.data.fill_(0.02)
            layers[f"{number}.{name}"] = AdditiveRepresentation(layer)
            decoded = layers[f"{number}.{name}"].decode()
            weights[f"{number}.{name}"] = torch.nn.Parameter(decoded)
    optimizer = PVOptimizer(layers, weights, {}, PVSettings())
    times = []
    for _ in range(2):
        for parameter in weights.values():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        started = time.perf_counter()
        optimizer.step(1.0, torch.Generator().manual_seed(0))
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0
    found["pv_step"] = {"model": llama.name, "seconds": times[-1], "peak_bytes": peak}
    return found


def tools(bench: Bench) -> Row:
    """compute-sanitizer on small cases and ncu's counters of the GEMV, where they are installed."""
    found: Row = {}
    commands = {
        "memcheck": ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"],
        "racecheck": ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"],
        "ncu": ["ncu", "--set", "full", "--kernel-name", "lut_gemv", "--launch-count", "1"],
    }
    for name, command in commands.items():
        if shutil.which(command[0]) is None or bench.dry:
            found[name] = "not run" if bench.dry else f"{command[0]} is not installed"
            continue
        left = max(10.0, min(90.0, bench.deadline - time.monotonic()))
        case = [*command, sys.executable, __file__, "--small-case"]
        try:
            done = subprocess.run(case, capture_output=True, text=True, timeout=left)
            found[name] = {"code": done.returncode, "output": (done.stdout + done.stderr)[-6000:]}
        except subprocess.TimeoutExpired:
            found[name] = f"not finished after {left:.0f} s"
    return found


def small_case() -> None:
    """One launch of every kernel, for tools that slow a program down a hundred times."""
    bench = Bench(torch.device("cuda"), False, 0.0)
    cases = (("2x8g8", 1), ("2x8g8", 2), ("1x16g8", 1), ("2x8g8", 16), ("2x8g8", 300))
    for scheme, tokens in cases:
        layer, exact = checked_layer(bench, scheme, 2100, 512, torch.float16)
        x = bench.x(tokens, 512)
        error = float((aqlm_packed_linear(x, layer).double() - x.double() @ exact.T).abs().max())
        print(scheme, tokens, error)
        if (scheme, tokens) == ("2x8g8", 1) and launch.gluon_gathers():
            config = LaunchConfig("lut_gluon", 1, 1024, 8, 2)
            launch.launch(config, x, blocks_of(layer), None, [1400, 700])


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "gemv": gemv,
    "model": model,
    "crossover": crossover,
    "design": design,
    "tuning": tuning,
    "tools": tools,
}


def describe(bench: Bench) -> Row:
    """The card, its driver and the versions."""
    card = choose.describe_gpu(bench.device)
    driver = "none"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": card.name,
        "capability": list(card.capability),
        "sms": card.sms,
        "driver": driver,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "dry_run": bench.dry,
    }


def summary(results: Row) -> str:
    """The short table that is printed last."""
    lines = [f"{results['gpu']}, torch {results['torch']}, Triton {results['triton']}"]
    for row in results.get("gemv") or []:
        peers = "".join(f"  {k} {v:.2f}x" for k, v in row.items() if k.startswith("over_"))
        lines.append(
            f"{row['layer'][0]:>6} x {row['layer'][1]:<6} {row['tokens']} tokens  "
            f"{row['microseconds']:8.1f} us  {row['of_copy_bandwidth']:5.0%} of copy{peers}"
        )
    for row in results.get("model") or []:
        lines.append(
            f"{row['model']}, {row['weights']}: {row['tokens_per_second']:.1f} tokens/s, "
            f"{row['of_copy_bandwidth']:.0%} of copy bandwidth"
        )
    lines += [f"{name}: {error}" for name, error in results["failures"].items()]
    return "\n".join(lines)


def main() -> None:
    """Run the sections in order, store after each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.0, help="time in all")
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small_case:
        small_case()
        return
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # nothing has imported Triton yet
    elif not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --dry-run tries the script itself on the CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    bench = Bench(device, options.dry_run, time.monotonic() + 60 * options.minutes)
    bench.results |= {**describe(bench), "failures": {}, "seconds": {}}
    folder = options.out or machine.ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "_", bench.results["gpu"].lower()).strip("_")
    for section in dict.fromkeys(["ceilings", *options.only]):
        started = time.monotonic()
        if started > bench.deadline:
            bench.results["failures"][section] = "no time left"
            continue
        try:
            with torch.no_grad():
                bench.results[section] = SECTIONS[section](bench)
        except Exception as error:
            bench.results["failures"][section] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        bench.results["seconds"][section] = time.monotonic() - started
        print(f"{section}: {time.monotonic() - started:.1f} s", flush=True)
        text = json.dumps(bench.results, indent=1)
        (folder / f"gpu_{name}.json").write_text(text + "\n")
    print(summary(bench.results))
    sys.exit(1 if bench.results["failures"] else 0)


if __name__ == "__main__":
    main()
