"""The C library beside this file: finding it, its signatures, threads and instruction set.

It has no dependency on torch or Python: `pip install` builds it with the system's C compiler, and
every torch can use it. Without it (no compiler) no kernel of `products.py` takes anything, and
dispatch falls back to the reference with a warning.

Threads are torch's own: the library calls the OpenMP runtime that torch has loaded.
"""

import ctypes
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libpvrt_cpu.so")
REMEDY = (
    "install a C compiler (apt-get install gcc), then pvrt again (pip install --force-reinstall)"
)
INSTRUCTION_SETS = ("avx512-vbmi", "avx2", "portable")  # the best first, as the library chooses
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_VOID = ctypes.c_void_p
_LONG = ctypes.c_int64


class TiledWeight(ctypes.Structure):
    """`tiled_weight` of cpu.h."""

    _fields_ = [
        ("codes", _VOID),
        ("tables", _VOID),
        ("scales", _VOID),
        ("rows", _VOID),
        ("parts", _LONG),
        ("books", _LONG),
        ("group", _LONG),
        ("groups", _LONG),
    ]


class PlainWeight(ctypes.Structure):
    """`plain_weight` of cpu.h."""

    _fields_ = [
        ("codes", _VOID),
        ("codebooks", _VOID),
        ("scales", _VOID),
        ("rows", _VOID),
        ("parts", _LONG),
        ("books", _LONG),
        ("group", _LONG),
        ("groups", _LONG),
        ("size", _LONG),
        ("code_bytes", _LONG),
        ("dtype", _LONG),
        ("tiled", _LONG),
    ]


@functools.cache
def library() -> Any:
    """The C library, or None where it was not built. PVRT_CPU_ISA names an instruction set.

    Raises ValueError when it names one that cannot be used here.
    """
    if not LIBRARY.is_file():
        return None
    lib = ctypes.CDLL(str(LIBRARY))
    lib.pvrt_use_isa.argtypes = [ctypes.c_char_p]
    lib.pvrt_use_isa.restype = lib.pvrt_isa_name.restype = ctypes.c_char_p
    lib.pvrt_isa_name.argtypes = lib.pvrt_table_rounding.argtypes = []
    lib.pvrt_table_rounding.restype = ctypes.c_double
    lib.pvrt_tiled_linear.argtypes = [_VOID, _VOID, _VOID, _VOID, _LONG, _LONG]
    lib.pvrt_plain_linear.argtypes = [_VOID, _VOID, _VOID, _VOID, _LONG, _LONG]
    lib.pvrt_decode_rows.argtypes = [_VOID, _VOID, _LONG, _LONG, _VOID, _LONG]
    lib.pvrt_decode_tiles.argtypes = [_VOID, _VOID, _LONG, _LONG, _VOID, _LONG, _LONG]
    lib.pvrt_tile_codes.argtypes = [_VOID, _VOID, _VOID, _LONG, _LONG, _LONG, _LONG]
    lib.pvrt_dense_linear.argtypes = [_VOID, _VOID, _VOID, _LONG, _LONG, _LONG, _LONG, _LONG]
    lib.pvrt_read_memory.argtypes = [_VOID, _LONG, _VOID, _LONG]
    lib.pvrt_huge_pages.argtypes = [_VOID, _LONG]
    lib.pvrt_nearest_sums.argtypes = [_VOID, _VOID, _LONG, _LONG, _LONG, _VOID, _LONG]
    lib.pvrt_lowest_scores.argtypes = [_VOID, _VOID, _LONG, _VOID, _LONG]
    lib.pvrt_parameter_gradients.argtypes = [_VOID, _VOID, _VOID, _VOID, _LONG]
    lib.pvrt_choose_codes.argtypes = [_VOID, _LONG, _LONG]
    lib.pvrt_latent_moment.argtypes = lib.pvrt_latent_step.argtypes = [_VOID, _LONG]
    for name in (
        "huge_pages",
        "tiled_linear",
        "plain_linear",
        "tile_codes",
        "decode_tiles",
        "dense_linear",
        "run_program",
        "read_memory",
        "nearest_sums",
        "lowest_scores",
        "choose_codes",
        "parameter_gradients",
        "latent_moment",
        "latent_step",
    ):
        getattr(lib, f"pvrt_{name}").restype = None
    lib.pvrt_run_program.restype = lib.pvrt_decode_rows.restype = _LONG
    lib.pvrt_run_program.argtypes = [_VOID, _LONG, _VOID, _LONG, _VOID, _LONG, _LONG]
    lib.pvrt_use_threads.argtypes = [_VOID, _VOID]
    lib.pvrt_use_threads(*torch_threads())
    wanted = os.environ.get("PVRT_CPU_ISA", "")
    if lib.pvrt_use_isa(wanted.encode()) is None:
        raise ValueError(
            f"PVRT_CPU_ISA is {wanted!r}, which cannot be used here: "
            f"unset it, or choose from {', '.join(_usable(lib))}"
        )
    return lib


def instruction_set() -> str | None:
    """The instruction set in use, of INSTRUCTION_SETS; None without the library."""
    lib = library()
    if lib is None:
        return None
    name: bytes = lib.pvrt_isa_name()
    return name.decode()


def usable_instruction_sets() -> list[str]:
    """Those of this CPU and library, the best first; none without the library."""
    lib, now = library(), instruction_set()
    if lib is None or now is None:
        return []
    found = _usable(lib)
    lib.pvrt_use_isa(now.encode())
    return found


def _usable(lib: Any) -> list[str]:
    """Instruction sets that can be used, each tried: the last that can stays in use."""
    return [name for name in INSTRUCTION_SETS if lib.pvrt_use_isa(name.encode()) is not None]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the kernels of a usable instruction set, then those of before."""
    now = instruction_set()
    assert now is not None
    library().pvrt_use_isa(name.encode())
    try:
        yield
    finally:
        library().pvrt_use_isa(now.encode())


def table_rounding() -> float:
    """`table_rounding` of cpu.h for the instruction set in use; 0 without the library."""
    lib = library()
    return 0.0 if lib is None else float(lib.pvrt_table_rounding())


def torch_threads() -> tuple[int | None, int | None]:
    """Addresses of GOMP_parallel, which all OpenMP runtimes have, and of omp_get_num_threads."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        lines = []
    loaded = {line.split()[-1] for line in lines if ".so" in line}
    own = {str(file) for file in Path(torch.__file__).with_name("lib").glob("lib*omp*")}
    runtimes = [p for p in loaded if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))]
    # torch's own first: another package may have brought a second runtime.
    for path in sorted(runtimes, key=lambda path: path not in own) or sorted(own):
        try:
            runtime = ctypes.CDLL(path)
            parallel, size = runtime.GOMP_parallel, runtime.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        return ctypes.cast(parallel, _VOID).value, ctypes.cast(size, _VOID).value
    return None, None


def huge_pages(weight: Tensor) -> None:
    """Ask the system for large pages below a large tensor that nothing was written to yet."""
    library().pvrt_huge_pages(weight.data_ptr(), weight.nbytes)


def read_bandwidth(
    seconds: float = 0.5, megabytes: int = 512, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes per second that torch's threads read from memory: the best of repeated sweeps.

    Far more than any cache, read once per sweep, each thread a contiguous part. For one thread on a
    shared machine the clock may be time.process_time.
    """
    memory = torch.empty(megabytes << 17, dtype=torch.int64)
    huge_pages(memory)
    memory.fill_(1)  # what was never written would share one page
    threads = torch.get_num_threads()
    sums = torch.empty(threads, 8, dtype=torch.int64)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = clock()
        library().pvrt_read_memory(memory.data_ptr(), memory.nbytes, sums.data_ptr(), threads)
        best = min(best, clock() - started)
    return memory.nbytes / best
