"""The CUDA kernel of the public `aqlm` package beside ours: its own code, built beforehand.

The package builds its extension when it is imported, which takes a minute. `--peer` names the
result of that build (`codebook_cuda.so`, from its two source files as they are) for this torch and
card; without it the package itself is imported, where it is installed.
"""

import importlib
from collections.abc import Callable
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench
from torch import Tensor

from pvrt_kernels.packed import PackedWeight

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def aqlm_kernel(file: Path | None) -> Kernel:
    """Its product for 2x8g8. Raises ImportError where there is neither a file nor the package."""
    if file is not None:
        loader = ExtensionFileLoader("codebook_cuda", str(file))
        spec = spec_from_file_location("codebook_cuda", file, loader=loader)
        if spec is None:
            raise ImportError(f"{file} is no extension module")
        module: Any = module_from_spec(spec)
        loader.exec_module(module)
        found: Kernel = module.code2x8_matmat
        return found
    select = importlib.import_module("aqlm.inference_kernels.kernel_selector")
    codebooks = torch.empty(2, 256, 1, 8, device="cuda")
    chosen: Kernel = select.get_forward_pass_kernel(codebooks, optimize_for_training=False)
    return chosen


def time_aqlm(bench: Bench, kernel: Kernel, x: Tensor, copies: list[PackedWeight]) -> float:
    """Seconds of the package's product with the same weights; checked against our decoding."""
    calls = []
    for weight in copies:
        codes, codebooks, scales = weight.unpack()
        calls.append(partial(kernel, x, codes.contiguous(), codebooks[0], scales, None))
    exact = x.double() @ copies[0].dequantize().double().T
    error = float((calls[0]().double() - exact).norm() / exact.norm())
    if not error < 0.05:
        raise AssertionError(f"the aqlm package's product is off by {error}")
    return bench.clock.time(calls)
