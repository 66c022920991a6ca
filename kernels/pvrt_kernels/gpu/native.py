"""The table lookups of `csrc/lut_gemv.cu`: compiled by NVRTC at first use, and launched.

NVRTC and NVIDIA's bindings for Python (`cuda.bindings`) come with the CUDA builds of torch. Where
they are missing, `missing` says what, and Triton's kernels take over.
"""

import ctypes
import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from pvrt_kernels.gpu.choose import STAGE_BYTES, LaunchConfig

# Two tables with a word for each codeword and position, or one with two words.
SHARED_BYTES = 2 * 256 * STAGE_BYTES * 4
_TYPES = (ctypes.c_void_p,) * 8 + (ctypes.c_int,) * 6
_log = logging.getLogger("pvrt")


@lru_cache(maxsize=1)
def missing() -> str | None:
    """What is missing to compile the kernel, in words, logged once; None where nothing is."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        _checked(nvrtc.nvrtcVersion())
    except Exception as error:  # a library that is not there raises RuntimeError
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        _log.warning(
            "slower Triton kernels are used: cuda-bindings or NVRTC is missing (%s)", reason
        )
        return reason
    return None


def constants(
    config: LaunchConfig, num_codebooks: int, size: int, group: int, dtype: torch.dtype
) -> dict[str, int]:
    """The constants that the source is compiled with."""
    threads = 32 * config.warps
    return {
        "CODEBOOKS": num_codebooks,
        "GROUP": group,
        "SIZE": size,
        "BF16": int(dtype == torch.bfloat16),
        "TOKENS": config.tokens,
        "THREADS": threads,
        "ROWS": config.rows // threads,
        "BLOCKS": 512 // threads if config.tokens < 4 else 1,
    }


def compile_source(defined: dict[str, int], architecture: str) -> bytes:
    """The machine code for an architecture like sm_90. Raises RuntimeError with NVRTC's words."""
    from cuda.bindings import nvrtc

    source = (files("pvrt_kernels.gpu") / "csrc" / "lut_gemv.cu").read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, b"lut_gemv.cu", 0, [], []))
    options = [f"-D{name}={value}" for name, value in defined.items()]
    options += [f"--gpu-architecture={architecture}", "-std=c++17"]
    done = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if int(done[0]):
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"lut_gemv.cu does not compile: {log.decode(errors='replace')}")
    code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


@dataclass(frozen=True)
class Function:
    """The kernel, loaded on one device."""

    handle: Any
    threads: int

    def start(self, grid: tuple[int, int], arguments: tuple[int, ...]) -> None:
        """Launch it on the current stream of the current device."""
        from cuda.bindings import driver

        _checked(
            driver.cuLaunchKernel(
                *(self.handle, *grid, 1, self.threads, 1, 1, SHARED_BYTES),
                *(torch.cuda.current_stream().cuda_stream, (arguments, _TYPES), 0),
            )
        )


@lru_cache(maxsize=256)
def function(
    device: int, config: LaunchConfig, codebooks: tuple[int, int, int], dtype: torch.dtype
) -> Function:
    """The kernel for a device and for codebooks of (count, size, group), compiled at first call."""
    from cuda.bindings import driver

    defined = constants(config, *codebooks, dtype)
    major, minor = torch.cuda.get_device_capability(device)
    module = _checked(driver.cuModuleLoadData(compile_source(defined, f"sm_{major}{minor}")))
    handle = _checked(driver.cuModuleGetFunction(module, b"lut_gemv"))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(handle, attribute, SHARED_BYTES))
    return Function(handle, 32 * config.warps)


def launch(
    config: LaunchConfig,
    x: Tensor,
    packed: tuple[Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    y: Tensor,
    workspace: tuple[Tensor, Tensor],
    tiles: int,
    ends: tuple[int, int],
) -> None:
    """y [tokens, rows] = x [tokens, in] times a packed weight, on x's device, which is current.

    packed: codes, codebooks, scales and an empty rest, as in `launch.GpuBlocks`; codebooks, scales
    and bias of x's type, float16 or bfloat16. ends: of the first and the second partition.
    """
    blocks, codebooks, scales, _ = packed
    _, count, size, group = codebooks.shape
    kernel = function(x.device.index, replace(config, split=1), (count, size, group), x.dtype)
    weight = [0 if t is None else t.data_ptr() for t in (blocks, codebooks, scales, bias)]
    sums = [t.data_ptr() for t in workspace]
    sizes = (blocks.shape[1], x.shape[1] // group, blocks.shape[0])
    for start in range(0, x.shape[0], config.tokens):
        some, to = x[start : start + config.tokens], y[start:].data_ptr()
        pointers = (some.data_ptr(), *weight, to, *sums)
        kernel.start((tiles, config.split), (*pointers, *sizes, some.shape[0], *ends))


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings returns behind its code. Raises RuntimeError for an error."""
    code, *values = result
    if int(code):
        raise RuntimeError(f"CUDA: {code.name}")
    return values[0] if values else None
