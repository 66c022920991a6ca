"""The CUDA kernels of csrc/, table lookups and tiles: compiled at first use, and launched."""

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pvrt_kernels.gpu.choose import STAGE_BYTES, LaunchConfig
from pvrt_kernels.gpu.nvrtc import checked, compile_source

SOURCES = {"lut_cuda": "lut_gemv", "tile_cuda": "tile_gemm"}  # a file and its function
_TYPES = (ctypes.c_void_p,) * 8 + (ctypes.c_int,) * 6


def constants(
    config: LaunchConfig, num_codebooks: int, size: int, group: int, dtype: torch.dtype
) -> dict[str, int]:
    """The constants that the source is compiled with."""
    threads = 32 * config.warps
    common = {
        "CODEBOOKS": num_codebooks,
        "GROUP": group,
        "SIZE": size,
        "BF16": int(dtype == torch.bfloat16),
        "TOKENS": config.tokens,
        "THREADS": threads,
    }
    if config.kernel == "lut_cuda":
        blocks = 512 // threads if config.tokens < 4 else 1
        return common | {"ROWS": config.rows // threads, "BLOCKS": blocks}
    tiles = config.rows // (16 * config.warps)
    return common | {"TILES": tiles, "BLOCKS": 2 if tiles * config.tokens <= 64 else 1}


def shared_bytes(config: LaunchConfig, num_codebooks: int, group: int) -> int:
    """Shared memory of a program."""
    if (
        config.kernel == "lut_cuda"
    ):  # two tables of one word for each code and position, or one of two words
        return 2 * 256 * STAGE_BYTES * 4
    return 256 * 128 + 2 * 32 * config.tokens * group // num_codebooks  # a table, x of two blocks


@dataclass(frozen=True)
class Function:
    """The kernel, loaded on one device."""

    handle: Any
    threads: int
    shared_bytes: int

    def start(self, grid: tuple[int, int], arguments: tuple[int, ...]) -> None:
        """Launch it on the current stream of the current device."""
        from cuda.bindings import driver

        checked(
            driver.cuLaunchKernel(
                *(self.handle, *grid, 1, self.threads, 1, 1, self.shared_bytes),
                *(torch.cuda.current_stream().cuda_stream, (arguments, _TYPES), 0),
            )
        )


@lru_cache(maxsize=256)
def function(
    device: int, config: LaunchConfig, codebooks: tuple[int, int, int], dtype: torch.dtype
) -> Function:
    """The kernel for a device and for codebooks of (count, size, group), compiled at first call."""
    from cuda.bindings import driver

    defined, name = constants(config, *codebooks, dtype), SOURCES[config.kernel]
    count, _, group = codebooks
    needed = shared_bytes(config, count, group)
    major, minor = torch.cuda.get_device_capability(device)
    code = compile_source(f"{name}.cu", defined, f"sm_{major}{minor}")
    module = checked(driver.cuModuleLoadData(code))
    handle = checked(driver.cuModuleGetFunction(module, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(handle, attribute, needed))
    return Function(handle, 32 * config.warps, needed)


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
