"""CPU kernels against torch, aqlm's numba kernel and llama.cpp's loops: results/cpu_kernels.json.

    python benchmarks/cpu_kernels.py                     # ours and torch
    PEERS/bin/python benchmarks/cpu_kernels.py           # with aqlm, numba, llama_cpp there

One token times a weight. Every kernel has several copies of the weight, read in turn, so that large
ones come from memory and not from the cache; table builds and quantisation of x are in the time.
Kernels take turns for as many rounds as --rounds says. With one thread a time is the median of
process CPU time, which other work on the machine barely disturbs; with two it is the smallest wall
time. llama.cpp's loops are its dot products row by row (what its matrix products call), rows shared
by torch's threads, which all kernels but aqlm's run in.
relative_error is against the same weight in float64: a format's own rounding of it is no error.
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import machine
import results
import workers

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (1536, 576), (576, 576)]
SCHEMES = ["2x8g8", "1x8g8", "1x8g4", "4x8g8", "1x16g8", "1x16g16"]
# bytes per 256 weights, and how x is quantised
GGML = {"q2_K": (84, "q8_K"), "q4_0": (144, "q8_0"), "iq2_xxs": (66, "q8_K")}
COLD_BYTES = 48 << 20  # more than the last-level cache that a core can fill
Kernel = tuple[Callable[[], Any], float]


def copies(count_bytes: int) -> int:
    """How many copies of a weight it takes that none is still in the cache at its next turn."""
    return max(1, min(64, -(-COLD_BYTES // count_bytes)))


def in_turn(things: list[Any]) -> Callable[[], Any]:
    """Something that gives the next of them at every call."""
    place = [0]

    def take() -> Any:
        place[0] = (place[0] + 1) % len(things)
        return things[place[0]]

    return take


def ours(scheme: str, out: int, inputs: int, x: Any) -> dict[str, Kernel]:
    """Packed, and for the published scheme in the checkpoint's layout as well."""
    import torch

    from pvrt.format.scheme import Scheme
    from pvrt_kernels import aqlm_linear, reference
    from pvrt_kernels.packed import aqlm_pack, aqlm_packed_linear

    form = Scheme.parse(scheme)
    limits = torch.iinfo(form.code_dtype)
    shape = form.codes_shape(out, inputs)
    codes = torch.randint(limits.min, limits.max + 1, shape, dtype=form.code_dtype)
    codebooks = torch.randn(form.codebooks_shape).half()
    scales = torch.rand(form.scales_shape(out)).half()
    exact = reference.dequantize(codes, codebooks[None].float(), scales.float(), [out]).double()
    expected = x.double() @ exact.T

    def error(y: Any) -> float:
        return float((y.double() - expected).norm() / expected.norm())

    number = copies(codes.nbytes)
    packs = [aqlm_pack(codes, codebooks, scales, torch.float32) for _ in range(number)]
    pack = in_turn(packs)
    kernels: dict[str, Kernel] = {}
    kernels[f"pvrt {scheme}"] = (
        lambda: aqlm_packed_linear(x, pack()),
        error(aqlm_packed_linear(x, pack())),
    )
    if scheme == "2x8g8":
        plain = in_turn([codes.clone() for _ in range(number)])
        kernels["pvrt 2x8g8, checkpoint layout"] = (
            lambda: aqlm_linear(x, plain(), codebooks, scales),
            error(aqlm_linear(x, codes, codebooks, scales)),
        )
        if importlib.util.find_spec("aqlm") and importlib.util.find_spec("numba"):
            kernels["aqlm numba 2x8g8"] = aqlm_numba(codes, codebooks, scales, x, error, number)
    return kernels


def aqlm_numba(
    codes: Any, codebooks: Any, scales: Any, x: Any, error: Callable[[Any], float], number: int
) -> Kernel:
    """The public package's CPU kernel: codes by input group. Its worst error of 20 calls counts."""
    from aqlm.inference_kernels.numba_kernel import numba_gemm_lut

    turned = in_turn([codes.transpose(0, 1).contiguous() for _ in range(number)])
    wide_codebooks, wide_scales = codebooks.float(), scales.float()

    def call() -> Any:
        return numba_gemm_lut(x, turned(), wide_codebooks, wide_scales, None)

    return call, max(error(call()) for _ in range(20))


def _product(x: Any, turn: Callable[[], Any]) -> Any:
    from torch.nn import functional as F

    return F.linear(x, turn())


def dense(out: int, inputs: int, x: Any) -> dict[str, Kernel]:
    """torch in two types."""
    import torch
    from torch.nn import functional as F

    weight = torch.randn(out, inputs)
    kernels: dict[str, Kernel] = {}
    for dtype in (torch.float32, torch.bfloat16):
        rounded, narrow = weight.to(dtype), x.to(dtype)
        expected = x.double() @ rounded.double().T
        found = F.linear(narrow, rounded).double()
        turn = in_turn([rounded.clone() for _ in range(copies(rounded.nbytes))])
        kernels[f"torch {str(dtype).removeprefix('torch.')}"] = (
            partial(_product, narrow, turn),
            float((found - expected).norm() / expected.norm()),
        )
    return kernels


_LOOP = """
#include <stdatomic.h>
#include <stddef.h>
typedef void (*dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
typedef void (*quantise)(const float *, void *, long);
typedef void (*team)(void (*)(void *), void *, unsigned, unsigned);
typedef struct {
    dot f; const void *x; int n, rows, shares; size_t bytes; const char *w; float *y;
    atomic_int taken;
} product;
static void share(void *data) {
    product *p = data;
    for (int k; (k = atomic_fetch_add(&p->taken, 1)) < p->shares;)
        for (int i = p->rows * k / p->shares; i < p->rows * (k + 1) / p->shares; i++)
            p->f(p->n, p->y + i, 0, p->w + i * p->bytes, 0, p->x, 0, 1);
}
void loop(dot f, quantise q, const float *x, void *xq, int n, int rows, size_t bytes,
          const char *w, float *y, team run, int threads) {
    product p = {f, xq, n, rows, threads, bytes, w, y, 0};
    q(x, xq, n);
    if (threads == 1) share(&p);
    else run(share, &p, threads, 0);
}
"""


def llama(out: int, inputs: int, x: Any, folder: Path, threads: int) -> dict[str, Kernel]:
    """ggml's dot products over all rows, x quantised inside, as its matrix product does."""
    import torch

    from pvrt_kernels.cpu.library import torch_threads

    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None or inputs % 256:
        return {}
    libraries = Path(spec.origin).parent / "lib"
    base = ctypes.CDLL(str(libraries / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(libraries / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
    cpu.ggml_cpu_init()
    source, built = folder / "loop.c", folder / "loop.so"
    if not built.is_file() or source.read_text() != _LOOP:
        source.write_text(_LOOP)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", built], check=True)
    loop = ctypes.CDLL(str(built)).loop
    void, some, team = ctypes.c_void_p, 64, torch_threads()[0]
    integer = ctypes.c_int
    loop.argtypes = [*4 * [void], integer, integer, ctypes.c_size_t, *3 * [void], integer]
    kernels: dict[str, Kernel] = {}
    for name, (bytes_of_256, of_x) in GGML.items():
        row_bytes = inputs // 256 * bytes_of_256
        base.ggml_quantize_init({"q2_K": 10, "q4_0": 2, "iq2_xxs": 16}[name])
        weight, importance = torch.randn(some, inputs), torch.ones(inputs)
        few = torch.empty(some * row_bytes, dtype=torch.uint8)
        quantise = getattr(base, f"quantize_{name}")
        quantise.argtypes = [void, void, ctypes.c_int64, ctypes.c_int64, void]
        quantise(weight.data_ptr(), few.data_ptr(), some, inputs, importance.data_ptr())
        decoded = torch.empty(some, inputs)
        back = getattr(base, f"dequantize_row_{name}")
        back.argtypes = [void, void, ctypes.c_int64]
        back(few.data_ptr(), decoded.data_ptr(), some * inputs)
        rows = few.reshape(some, row_bytes)[torch.arange(out) % some].contiguous()
        turn = in_turn([rows.clone() for _ in range(copies(rows.nbytes))])
        dot = ctypes.cast(getattr(cpu, f"ggml_vec_dot_{name}_{of_x}"), void)
        quantise_x = ctypes.cast(getattr(cpu, f"quantize_row_{of_x}"), void)
        scratch, y = torch.empty(inputs * 2, dtype=torch.uint8), torch.empty(out)

        def call(dot: Any = dot, q: Any = quantise_x, turn: Any = turn, r: Any = row_bytes,
                 scratch: Any = scratch, y: Any = y) -> None:  # fmt: skip
            loop(dot, q, x.data_ptr(), scratch.data_ptr(), inputs, out, r, turn().data_ptr(),
                 y.data_ptr(), team, threads)  # fmt: skip

        call()
        expected = (x.double() @ decoded.double().T)[0]
        error = float((y[:some].double() - expected).norm() / expected.norm())
        kernels[f"llama.cpp {name}"] = (call, error)
    return kernels


def measure(threads: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All kernels over all shapes with a number of threads."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = time.process_time if threads == 1 else time.perf_counter
    rows = []
    for out, inputs in SHAPES:
        x = torch.randn(1, inputs)
        kernels = dense(out, inputs, x)
        for scheme in SCHEMES:
            kernels.update(ours(scheme, out, inputs, x))
        kernels.update(llama(out, inputs, x, folder, threads))
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for call, _ in kernels.values():
            call()
        for _ in range(rounds):
            for name, (call, _) in kernels.items():
                for _ in range(3):
                    started = clock()
                    call()
                    times[name].append(clock() - started)
        for name, (_, error) in kernels.items():
            found = median(times[name]) if threads == 1 else min(times[name])
            row = {
                "shape": f"{out}x{inputs}",
                "threads": threads,
                "kernel": name,
                "microseconds": round(found * 1e6, 1),
                "relative_error": float(f"{error:.2g}"),
            }
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Run the measurement once per number of threads."""
    options = workers.options(__doc__, rounds=15)
    folder = machine.ROOT / "build" / "cpu_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    if options.worker:
        print(json.dumps(measure(options.threads[0], options.rounds, folder)))
        return
    for threads in options.threads:
        numba = {"NUMBA_NUM_THREADS": str(threads)}
        rows = workers.measured(__file__, threads, options.rounds, **numba)
        rows = results.renewed(results.load("cpu_kernels"), rows, "threads")
        results.store("cpu_kernels", rows)


if __name__ == "__main__":
    main()
