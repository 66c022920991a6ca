"""What this machine has: free memory and disk; and giving memory back to it."""

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from pvrt.device import (
    cpu_features,
    free_device_bytes,
    is_here,
    multiplies_bfloat16,
    release_device_memory,
)
from pvrt.memory import free_host_bytes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Machine:
    """Free bytes of host memory, of the device's memory (None: it is the host's) and of disk."""

    host: int
    device: int | None
    disk: int

    @classmethod
    def here(cls, device: str, out: Path) -> "Machine":
        """This machine; a container's memory limit counts where it is lower."""
        folders = [out.absolute(), *out.absolute().parents]
        disk = psutil.disk_usage(str(next(folder for folder in folders if folder.exists()))).free
        return cls(free_host_bytes(), free_device_bytes(device), disk)


def compute_dtype(wanted: str, device: str) -> torch.dtype:
    """What "auto", "float32" or "bfloat16" means on a device: auto is bfloat16 where products of it
    are faster, which is on GPUs from Ampere on (a GPU that is planned for and not here counts as
    one) and on CPUs with AMX or AVX-512 BF16.
    """
    if wanted != "auto":
        return torch.float32 if wanted == "float32" else torch.bfloat16
    if device != "cpu":
        fast = not is_here(device) or multiplies_bfloat16(device)
    else:
        fast = bool(cpu_features() & {"amx_bf16", "avx512_bf16"})
    return torch.bfloat16 if fast else torch.float32


def host_dtype(itemsize: int) -> torch.dtype:
    """What a CPU computes an original of numbers of `itemsize` bytes in: bfloat16 for 16 bits where
    products of it are faster, else float32.
    """
    return compute_dtype("auto" if itemsize == 2 else "float32", "cpu")


def map_large_tensors() -> None:
    """Have glibc map every allocation of 4 MiB and more on its own, as it does from 32 MiB on.

    In its heap, tensors of one stage leave holes that those of the next do not fit: fine-tuning a
    block of a 0.3B model held twice the memory of its tensors. Free memory at the end of the heap
    stays until `release_memory`: glibc would give back whatever exceeds 128 KiB, and fetch it again
    for the next tensor, page by page: 0.4 to 0.9 of 10 s in which a block of SmolLM2 is tuned.
    """
    options = _glibc("mallopt")
    if options is not None:
        options(_M_MMAP_THRESHOLD, 4 << 20)
        options(_M_TRIM_THRESHOLD, 64 << 20)


def release_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps what a stage freed in pieces, and the next stage asks for other sizes: without this
    a run's peak is the sum of its stages' instead of the largest.
    """
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)
    release_device_memory()


def _glibc(name: str) -> Any:
    """A function of the C library, where that is glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
