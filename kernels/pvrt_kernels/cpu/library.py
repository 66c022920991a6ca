"""CPU kernels: the C library beside this file, its two registrations and what else it offers.

`cpu` multiplies by weights in the checkpoint's layout, `cpu-tiles` by packed ones (8-bit codes
through lookup tables, see csrc/cpu.h). All sums are fp32; `cpu_rounding` bounds the errors. The
library has no dependency on torch or Python: `pip install` builds it with the system's C compiler,
and every torch can use it. Without it (no compiler) nothing registers, and dispatch falls back to
the reference with a warning.

Threads are torch's own: the library calls the OpenMP runtime that torch has loaded.
"""

import ctypes
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt_kernels import dispatch, reference

LIBRARY = Path(__file__).with_name("libpvrt_cpu.so")
REMEDY = "install a C compiler (apt-get install gcc) and pip install --force-reinstall pvrt"
INSTRUCTION_SETS = ("avx512-vbmi", "avx2", "portable")  # the best first, as the library chooses
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TILE, _ENTRIES = 64, 256
# Rows decoded at a time for a dense product: 1 MiB of fp32 stays in the second-level cache.
_PANEL_BYTES = 1 << 20
# From this many tokens on, decoding rows once costs less than looking codes up for every token.
_MANY = 4
# AMX multiplies bfloat16 so fast that decoding rows pays early.
_MANY_WITH_AMX = 16
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
    lib.pvrt_decode_rows.argtypes = [_VOID, _LONG, _LONG, _VOID, _LONG]
    lib.pvrt_tile_codes.argtypes = [_VOID, _VOID, _VOID, _LONG, _LONG, _LONG, _LONG]
    lib.pvrt_dense_linear.argtypes = [_VOID, _VOID, _VOID, _LONG, _LONG, _LONG, _LONG, _LONG]
    lib.pvrt_read_memory.argtypes = [_VOID, _LONG, _VOID, _LONG]
    lib.pvrt_huge_pages.argtypes = [_VOID, _LONG]
    lib.pvrt_nearest_sums.argtypes = [_VOID, _VOID, _LONG, _LONG, _LONG, _VOID, _LONG]
    lib.pvrt_parameter_gradients.argtypes = [_VOID, _VOID, _VOID, _VOID, _LONG]
    lib.pvrt_choose_codes.argtypes = [_VOID, _LONG, _LONG]
    lib.pvrt_latent_moment.argtypes = lib.pvrt_latent_step.argtypes = [_VOID, _LONG]
    for name in (
        "huge_pages",
        "tiled_linear",
        "plain_linear",
        "decode_rows",
        "tile_codes",
        "dense_linear",
        "run_program",
        "read_memory",
        "nearest_sums",
        "choose_codes",
        "parameter_gradients",
        "latent_moment",
        "latent_step",
    ):
        getattr(lib, f"pvrt_{name}").restype = None
    lib.pvrt_run_program.argtypes = [_VOID, _LONG, _VOID, _LONG, _VOID, _LONG, _LONG]
    lib.pvrt_use_threads.argtypes = [_VOID, _VOID]
    lib.pvrt_use_threads(*torch_threads())
    wanted = os.environ.get("PVRT_CPU_ISA", "")
    if lib.pvrt_use_isa(wanted.encode()) is None:
        usable = [name for name in INSTRUCTION_SETS if lib.pvrt_use_isa(name.encode())]
        raise ValueError(
            f"PVRT_CPU_ISA is {wanted!r}, which cannot be used here: "
            f"unset it, or choose from {', '.join(usable)}"
        )
    return lib


def instruction_set() -> str | None:
    """The instruction set in use, of INSTRUCTION_SETS; None without the library."""
    lib = library()
    if lib is None:
        return None
    name: bytes = lib.pvrt_isa_name()
    return name.decode()


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


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _supports(problem: dispatch.Problem) -> bool:
    return (
        problem.device_type == "cpu"
        and problem.out_group_size == 1
        and problem.dtype in TYPES
        and library() is not None
    )


def plain_weight(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    rows: Tensor,
    in_features: int,
    tiled: bool = False,
) -> PlainWeight:
    """The C view of a weight in the checkpoint's layout; valid as long as its tensors live."""
    parts, books, size, _, group = codebooks.shape
    return PlainWeight(
        codes.data_ptr(),
        codebooks.data_ptr(),
        scales.data_ptr(),
        rows.data_ptr(),
        parts,
        books,
        group,
        in_features // group,
        size,
        1 if tiled else codes.element_size(),
        TYPES[codebooks.dtype],
        tiled,
    )


def _by_panels(x: Tensor, weight: PlainWeight, out: int, bias: Tensor | None) -> Tensor:
    """x [tokens, in] times rows that are decoded panel by panel, while they are in the cache."""
    lib, threads, features = library(), torch.get_num_threads(), x.shape[1]
    step = max(64, _PANEL_BYTES // (4 * features))
    panel = torch.empty(min(step, out), features)
    y = x.new_empty(x.shape[0], out)
    for first in range(0, out, step):
        count = min(step, out - first)
        lib.pvrt_decode_rows(ctypes.byref(weight), first, count, panel.data_ptr(), threads)
        part = None if bias is None else bias[first : first + count].to(x.dtype)
        y[:, first : first + count] = F.linear(x, panel[:count].to(x.dtype), part)
    return y


def _linear(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    partition_sizes: list[int],
) -> Tensor:
    codes, books, fp32_scales = codes.contiguous(), codebooks.contiguous(), _fp32(scales)
    if books.dtype not in TYPES:
        return reference.linear(x, codes, codebooks, scales, bias, partition_sizes)
    rows = torch.tensor(partition_sizes)
    weight = plain_weight(codes, books, fp32_scales, rows, x.shape[-1])
    return _multiply_plain(x, weight, codes.shape[0], bias)


def _multiply_plain(x: Tensor, weight: PlainWeight, out: int, bias: Tensor | None) -> Tensor:
    flat = _fp32(x.reshape(-1, x.shape[-1]))
    fp32_bias = None if bias is None else _fp32(bias)
    if flat.shape[0] >= _MANY:
        y = _by_panels(flat, weight, out, fp32_bias)
    else:
        y = torch.empty(flat.shape[0], out)
        library().pvrt_plain_linear(
            ctypes.byref(weight),
            flat.data_ptr(),
            _pointer(fp32_bias),
            y.data_ptr(),
            flat.shape[0],
            torch.get_num_threads(),
        )
    return y.to(x.dtype).reshape(*x.shape[:-1], out)


# Packed tensors: codes (tiles, or as in the checkpoint for more than 8 bits), codebooks and scales
# as given, fp32 scales, rows of the partitions, and fp32 tables (see cpu.h; empty without tiles).
def _pack(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> list[Tensor]:
    parts, books, size = codebooks.shape[:3]
    rows = torch.tensor(partition_sizes)
    given = [codebooks.detach().clone(), scales.detach().clone(), _fp32(scales).flatten(), rows]
    if codes.element_size() == 2:
        return [codes.detach().clone(), *given, torch.empty(0)]
    tiles = sum(-(-n // _TILE) for n in partition_sizes)
    packed = torch.empty(tiles * _TILE * codes.shape[1] * books, dtype=torch.uint8)
    plain = codes.detach().contiguous()
    library().pvrt_tile_codes(
        plain.data_ptr(), packed.data_ptr(), rows.data_ptr(), parts, codes.shape[1], books, 0
    )
    entries = torch.arange(_ENTRIES) % size  # a stored byte v means v mod size
    tables = codebooks.detach().float()[:, :, entries, 0].transpose(2, 3).contiguous()
    return [packed, *given, tables]


def _unpack(packed: list[Tensor], in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    stored, codebooks, scales, _, rows, tables = packed
    if not tables.numel():
        return stored, codebooks, scales
    parts, books, _, _, group = codebooks.shape
    codes = torch.empty(scales.shape[0], in_features // group, books, dtype=torch.int8)
    library().pvrt_tile_codes(
        codes.data_ptr(), stored.data_ptr(), rows.data_ptr(), parts, codes.shape[1], books, 1
    )
    return codes, codebooks, scales


def _packed_plain(packed: list[Tensor], in_features: int) -> PlainWeight:
    codes, codebooks, _, scales, rows, tables = packed
    return plain_weight(codes, codebooks, scales, rows, in_features, tables.numel() > 0)


def _packed_linear(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, partition_sizes: list[int]
) -> Tensor:
    _, _, _, scales, _, tables = packed
    in_features, out = x.shape[-1], scales.shape[0]
    if not tables.numel():
        return _multiply_plain(x, _packed_plain(packed, in_features), out, bias)
    flat = x.reshape(-1, in_features)
    tokens = flat.shape[0]
    if tokens >= _MANY_WITH_AMX and x.dtype == torch.bfloat16 and has_amx():
        y = _by_panels(flat.contiguous(), _packed_plain(packed, in_features), out, bias)
        return y.reshape(*x.shape[:-1], out)
    flat = _fp32(flat)
    fp32_bias = None if bias is None else _fp32(bias)
    y = torch.empty(tokens, out)
    library().pvrt_tiled_linear(
        ctypes.byref(tiled_weight(packed, in_features)),
        flat.data_ptr(),
        _pointer(fp32_bias),
        y.data_ptr(),
        tokens,
        torch.get_num_threads(),
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], out)


def tiled_weight(packed: list[Tensor], in_features: int) -> TiledWeight:
    """The C view of packed tensors with tiles; valid as long as they live."""
    codes, codebooks, _, scales, rows, tables = packed
    parts, books, _, _, group = codebooks.shape
    return TiledWeight(
        codes.data_ptr(),
        tables.data_ptr(),
        scales.data_ptr(),
        rows.data_ptr(),
        parts,
        books,
        group,
        in_features // group,
    )


def huge_pages(weight: Tensor) -> None:
    """Ask the system for large pages below a large tensor that nothing was written to yet."""
    library().pvrt_huge_pages(weight.data_ptr(), weight.nbytes)


def view(packed: list[Tensor], in_features: int) -> tuple[str, TiledWeight | PlainWeight]:
    """The C view of packed tensors, "tiled" or "plain"; valid as long as they live."""
    if packed[5].numel():
        return "tiled", tiled_weight(packed, in_features)
    return "plain", _packed_plain(packed, in_features)


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


def _packed_dequantize(
    packed: list[Tensor], partition_sizes: list[int], in_features: int
) -> Tensor:
    weight = _decoded(_packed_plain(packed, in_features), packed[3].shape[0], in_features)
    return weight.to(packed[1].dtype)


def can_decode(codes: Tensor, codebooks: Tensor) -> bool:
    """Whether `dequantize` takes codes [out, in/g, M] and codebooks [P, M, K, 1, g]."""
    return (
        codes.device.type == "cpu"
        and codes.element_size() <= 2
        and codebooks.shape[3] == 1
        and codebooks.dtype in TYPES
        and library() is not None
    )


def dequantize(
    codes: Tensor, codebooks: Tensor, scales: Tensor, partition_sizes: list[int]
) -> Tensor:
    """What `reference.dequantize` returns, to the bit."""
    codes, books, fp32_scales = codes.contiguous(), codebooks.contiguous(), _fp32(scales)
    rows, in_features = torch.tensor(partition_sizes), codes.shape[1] * codebooks.shape[4]
    weight = plain_weight(codes, books, fp32_scales, rows, in_features)
    return _decoded(weight, len(codes), in_features).to(codebooks.dtype)


def _decoded(weight: PlainWeight, out: int, in_features: int) -> Tensor:
    """All rows in fp32."""
    rows = torch.empty(out, in_features)
    library().pvrt_decode_rows(
        ctypes.byref(weight), 0, out, rows.data_ptr(), torch.get_num_threads()
    )
    return rows


@functools.cache
def has_amx() -> bool:
    """Whether torch's bfloat16 products run on Intel's matrix units here."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, in] fp32 times a dense weight [out, in] of fp32, fp16 or bf16 -> fp32.

    For few tokens: a 16-bit weight is read as it is and summed in fp32, at memory speed.
    """
    y = torch.empty(x.shape[0], weight.shape[0])
    library().pvrt_dense_linear(
        weight.data_ptr(),
        x.contiguous().data_ptr(),
        y.data_ptr(),
        x.shape[0],
        weight.shape[0],
        weight.shape[1],
        TYPES[weight.dtype],
        torch.get_num_threads(),
    )
    return y


def register() -> None:
    """Enter both kernels into the dispatch table; they take nothing where the library lacks."""
    if not LIBRARY.is_file():
        dispatch.remedies["cpu"] = REMEDY
    dispatch.register(dispatch.Kernel("cpu", _supports, _linear))
    dispatch.register_packed(
        dispatch.PackedKernel(
            "cpu-tiles", _supports, _pack, _unpack, _packed_linear, _packed_dequantize
        )
    )
