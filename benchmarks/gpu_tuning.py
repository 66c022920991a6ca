"""Section `tuning` of gpu.py: seconds and memory of one layer's calibration and of a PV step."""

import time

import gpu_llama
import torch
from gpu_bench import Bench

from pvrt.format.scheme import Scheme
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.pv.optimizer import PVOptimizer
from pvrt_tune.pv.representation import AdditiveRepresentation
from pvrt_tune.settings import FitSettings, PVSettings

ONE_BILLION = gpu_llama.Llama("1B shape", 2048, 8192, 16, 32, 8, 128256, head=64)


def tuning(bench: Bench) -> None:
    """Calibrate a layer of a 7B model, step on a 1B-shaped model, calibrate a wider layer."""

    def measure(case: tuple[int, int] | gpu_llama.Llama) -> None:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)
        if isinstance(case, gpu_llama.Llama):
            step(bench, case)
        else:
            calibrate(bench, *case)

    one_billion, first, wider = bench.some(
        (ONE_BILLION, (4096, 4096), (11008, 4096)), (gpu_llama.TINY, (64, 64), (96, 64))
    )
    bench.each([first, one_billion, wider], measure)


def calibrate(bench: Bench, out: int, features: int) -> None:
    """Fit one layer to random weights and inputs."""
    settings = FitSettings(rounds=1, kmeans_iterations=2) if bench.dry else FitSettings()
    weight, x = bench.x(out, features).float(), bench.x(4 * features, features).float()
    generator = torch.Generator().manual_seed(0)
    xtx = x.T @ x / len(x)
    del x
    started = time.perf_counter()
    fit = fit_layer(weight, xtx, Scheme.parse("2x8g8"), settings, generator)
    result = fit.result(torch.float16)
    bench.row(
        calibrated=[out, features],
        seconds=time.perf_counter() - started,
        relative_error=result.relative_error,
        peak_bytes=peak(bench),
    )


def step(bench: Bench, llama: gpu_llama.Llama) -> None:
    """Two PV steps with random gradients; the second is the one that counts."""
    scheme = Scheme.parse("2x8g8")
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
    for number in (1, 2):
        for parameter in weights.values():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        started = time.perf_counter()
        optimizer.step(1.0, torch.Generator().manual_seed(0))
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        bench.row(pv_step=number, model=llama.name, seconds=seconds, peak_bytes=peak(bench))


def peak(bench: Bench) -> int:
    """Most bytes of device memory since the last reset."""
    return torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0
