"""Sections of gpu.py that time products and steps: ceilings, gemv, native, model, crossover."""

import importlib.util
import platform
from importlib.metadata import version
from pathlib import Path

import gpu_llama
import gpu_peers
import torch
from gpu_bench import TWO_BIT, Bench, rate

from pvrt.tools import bench_kernels
from pvrt.tools.bench_kernels import blocks_of, time_config, weight_copies
from pvrt_kernels.gpu import choose, launch
from pvrt_kernels.gpu.choose import Shape

GEMV_LAYERS = (
    *((4096, 4096), (22016, 4096), (4096, 11008), (6144, 4096)),
    *((28672, 8192), (1024, 4096)),
)
CROSSOVER_LAYERS = ((4096, 4096), (22016, 4096), (4096, 11008))
CROSSOVER_TOKENS = (8, 16, 32, 64, 2, 4, 128, 256, 512)
ONE_BIG = (1, 65536, 8)
HEAD = (4, 256, 8)
LLAMAS = (gpu_llama.LLAMA3_8B, gpu_llama.LLAMA2_7B)


def ceilings(bench: Bench) -> None:
    """The card, copy bandwidth and the rate of cuBLAS in float16."""
    card = choose.describe_gpu(bench.device)
    bench.row(
        gpu=card.name,
        capability=list(card.capability),
        sms=card.sms,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=version("triton"),
        python=platform.python_version(),
        compiles_cuda=choose.describe_gpu(bench.device).compiles_cuda,
    )
    bench.row(copy_bytes_per_second=bench_kernels.copy_bandwidth(bench.device))
    n = 64 if bench.dry else 8192
    a = bench.x(n, n)
    bench.row(gemm_flops_per_second=2 * n**3 / bench.clock.time([lambda: a @ a]))


def gemv(bench: Bench, peer: Path | None) -> None:
    """Decoding, 1 and 4 tokens: ours, cuBLAS float16 and the aqlm package in one run."""
    aqlm = None
    if bench.device.type == "cuda":
        try:
            aqlm = gpu_peers.aqlm_kernel(peer)
        except Exception as error:  # a missing package, compiler or header is a result too
            bench.row(aqlm_cuda=f"{type(error).__name__}: {str(error)[:300]}")

    def measure(layer: tuple[int, int]) -> None:
        shape = Shape(*TWO_BIT, *layer)
        weight = bench_kernels.random_packed(shape, torch.float16, bench.device)
        copies = weight_copies(weight, 2 if bench.dry else 64)
        for tokens in bench.some((1, 4), (1,)):
            x = bench.x(tokens, shape.in_features)
            config = launch.config_for(x, blocks_of(weight))
            seconds = time_config(bench.clock, config, x, copies)
            dense = bench_kernels.time_dense(bench.clock, x, shape)
            row = rate(bench, shape, vars(config), seconds)
            row |= {"tokens": tokens, "over_cublas_fp16": dense / seconds}
            if aqlm is not None:
                try:
                    theirs = gpu_peers.time_aqlm(bench, aqlm, x, copies)
                    row |= {"over_aqlm_cuda": theirs / seconds, "aqlm_microseconds": theirs * 1e6}
                except Exception as error:
                    row["aqlm_error"] = f"{type(error).__name__}: {str(error)[:300]}"
            bench.row(**row)

    bench.each(bench.some(GEMV_LAYERS, ((70, 96),)), measure)


def native(bench: Bench, file: Path) -> None:
    """Kernels under trial: `run(bench)` of a file outside the repository; its rows are kept."""
    spec = importlib.util.spec_from_file_location("native_candidates", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for row in module.run(bench) or ():
        bench.row(**row)


def crossover(bench: Bench) -> None:
    """Batches 2 to 512 under every kernel that takes them: the rules of a table."""
    card = choose.describe_gpu(bench.device)

    def measure(case: tuple[tuple[int, int, int], tuple[int, int]]) -> None:
        scheme, layer = case
        shape = Shape(*scheme, *layer)
        weight = bench_kernels.random_packed(shape, torch.float16, bench.device)
        copies = weight_copies(weight, 2 if bench.dry else 16)
        for tokens in bench.some(CROSSOVER_TOKENS, (8,)):
            x = bench.x(tokens, shape.in_features)
            dense = bench_kernels.time_dense(bench.clock, x, shape)
            for config in bench_kernels.candidates(card, shape, tokens):
                seconds = time_config(bench.clock, config, x, copies)
                row = rate(bench, shape, vars(config), seconds)
                bench.row(**row, tokens=tokens, over_cublas_fp16=dense / seconds)

    schemes = bench.some((TWO_BIT, ONE_BIG), (TWO_BIT,))
    layers = bench.some(CROSSOVER_LAYERS, ((70, 96),))
    bench.each([(scheme, layer) for scheme in schemes for layer in layers], measure)


Codes = tuple[int, int, int] | None


def model(bench: Bench) -> None:
    """Tokens per second of whole decoding steps at 1k tokens of context, against float16."""
    took: dict[str, float] = {}

    def measure(case: tuple[gpu_llama.Llama, str, Codes, Codes]) -> None:
        llama, name, linears, head = case
        need = 4e9 if linears else 18e9
        if not bench.dry and torch.cuda.mem_get_info()[0] < need:
            bench.row(model=llama.name, weights=name, error="too little memory is free")
            return
        step = gpu_llama.DecodeStep(llama, linears, head, 1024, torch.float16, bench.device)
        try:
            seconds, glue = bench.clock.time([step]), "compiled"
        except Exception as error:  # Inductor asks much of a machine
            bench.row(model=llama.name, weights=name, glue_error=str(error)[:500])
            step.fuse(lambda function: function)
            seconds, glue = bench.clock.time([step]), "eager"
        dense = took.setdefault(llama.name, seconds)
        bench.row(
            model=llama.name,
            weights=name,
            glue=glue,
            tokens_per_second=1 / seconds,
            bytes=step.bytes,
            of_copy_bandwidth=step.bytes / seconds / bench.copy_rate,
            over_float16=dense / seconds,
        )

    llamas = bench.some(LLAMAS, (gpu_llama.TINY,))
    weights: tuple[tuple[str, Codes, Codes], ...]
    weights = (
        ("float16", None, None),
        ("2x8g8, head 4x8g8", TWO_BIT, HEAD),
        ("2x8g8, head float16", TWO_BIT, None),
    )
    bench.each([(llama, *weight) for llama in llamas for weight in weights], measure)
