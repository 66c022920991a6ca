"""Fill Triton's cache with what gpu.py will launch, by several processes, with or without a GPU.

    TRITON_CACHE_DIR=/tmp/warm python benchmarks/gpu_warm.py --jobs 16
    TRITON_CACHE_DIR=/tmp/warm python benchmarks/gpu_warm.py --jobs 2 --pack warm.tar.gz

The keys of the cache hold the versions of Triton and ptxas, the sources, the specialisation and the
target, no path and no driver: what is compiled here is found on a machine with the same Triton and
Python. Its entries hold absolute paths, so --pack's archive is to be unpacked in the same folder.
Kernels go through the library's own launches, on CPU tensors, with launching taken out: so keys are
those of real launches. Without a GPU the card is an H100 (--sms, --capability).
"""

import argparse
import hashlib
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_checks
import gpu_rates
import torch
from gpu_bench import TWO_BIT

from pvrt.format.scheme import Scheme
from pvrt.tools import bench_kernels
from pvrt_kernels.gpu import choose, launch
from pvrt_kernels.gpu.choose import CUDA, DENSE, Gpu, LaunchConfig, Shape

HALF, TYPES = torch.float16, gpu_checks.TYPES
#: `platform.architecture()` says less where no `file` command is: launchers are kept for both.
PLATFORMS = ("x86_64,Linux,64bit,ELF", "x86_64,Linux,64bit,")
KEPT = (".cubin", ".json", ".so")  # of an entry; the rest is for reading


class Binary(NamedTuple):
    """What makes a binary: a launch config (its split does not), a scheme, types, partitions.

    The kernel "rows" is decoding by number.
    """

    config: LaunchConfig
    scheme: str
    dtype: torch.dtype = HALF
    parts: int = 1


def binaries(card: Gpu) -> list[Binary]:
    """All, in the order in which gpu.py needs them."""
    found = [*of_the_product(card), *of_checks(card), *of_rates(card)]
    return list(
        dict.fromkeys(
            each._replace(config=replace(each.config, split=1))
            for each in found
            if each.config.kernel not in CUDA  # NVRTC's
        )
    )


def of_the_product(card: Gpu) -> Iterator[Binary]:
    """A model in the default scheme, as it is loaded and answers."""
    for dtype in TYPES:
        for parts in (1, 3):
            for layer in ((576, 576), (4096, 4096)):
                for tokens in launch.WARM_TOKENS:
                    config = choose.choose(card, Shape(*TWO_BIT, *layer), tokens, dtype, False)
                    yield Binary(config, "2x8g8", dtype, parts)
        yield Binary(DENSE, "2x8g8", dtype)
        yield Binary(LaunchConfig("rows"), "2x8g8", dtype)


def of_checks(card: Gpu) -> Iterator[Binary]:
    """Section `correctness`."""
    for check in gpu_checks.checks(card, False):
        form = Scheme.parse(check.scheme)
        sizes = (form.num_codebooks, form.codebook_size, form.in_group_size)
        tokens = 1 << (check.tokens - 1).bit_length() if check.tokens <= 64 else check.tokens
        shape = Shape(*sizes, check.out, check.features)
        config = check.config or choose.choose(card, shape, tokens, check.dtype, False)
        parts = 1 if len(gpu_checks.partitions(check.scheme, check.out)) == 1 else 3
        yield Binary(config, check.scheme, check.dtype, parts)


def of_rates(card: Gpu) -> Iterator[Binary]:
    """Sections `gemv`, `model`, `crossover` and `autotune`, in float16."""
    llamas = [layer for llama in gpu_rates.LLAMAS for layer in llama.linears]
    layers = [*gpu_rates.GEMV_LAYERS, *llamas, *bench_kernels.COMMON_LAYERS]
    for layer in layers:
        for tokens in launch.WARM_TOKENS:
            config = choose.choose(card, Shape(*TWO_BIT, *layer), tokens, HALF, False)
            yield Binary(config, "2x8g8")
    for scheme in (TWO_BIT, gpu_rates.ONE_BIG):
        for layer in layers:
            shape = Shape(*scheme, *layer)
            for tokens in (1, *gpu_rates.CROSSOVER_TOKENS):
                for config in bench_kernels.candidates(card, shape, tokens):
                    yield Binary(config, shape.scheme)


class CompileOnly:
    """Stands in for Triton's driver: a target, and a device that is never asked for more."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> Any:
        """As the real driver builds it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


def install(card: Gpu) -> None:
    """Let every launch of a Triton function compile, store its launcher, and do no more."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build, driver
    from triton.runtime.cache import get_cache_manager
    from triton.runtime.jit import JITFunction

    driver.set_active(CompileOnly(card.capability))
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, **options: Any) -> None:
        kernel = run(self, *arguments, **{**options, "warmup": True})
        if hasattr(nvidia, "make_launcher"):  # before Triton 3.7, one in C for each signature
            store(lambda: nvidia.CudaLauncher(kernel.src, kernel.metadata))

    def store(make: Any) -> None:
        for platform in PLATFORMS:
            build.platform_key = lambda platform=platform: platform
            try:
                make()
            except ImportError:  # there is no libcuda here to load it with; it is stored by now
                continue

    def unless_stored(src: str, name: str, **more: Any) -> Any:
        key = hashlib.sha256((src + build.platform_key()).encode()).hexdigest()
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if get_cache_manager(key).get_file(name + suffix):
            raise ImportError("stored before, and not needed here")
        return compile_module(src=src, name=name, **more)

    compile_module = nvidia.compile_module_from_src
    nvidia.compile_module_from_src = unless_stored
    JITFunction.run = compile_only
    try:
        nvidia.library_dirs()
    except AssertionError:  # no libcuda to link with
        folder = stub()
        nvidia.library_dirs = lambda: [folder]
    store(partial(object.__new__(nvidia.CudaUtils).__init__))


def stub() -> str:
    """A folder with an empty libcuda.so.1."""
    folder = tempfile.mkdtemp()
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
    subprocess.run([*command, "-xc", "/dev/null"], check=True)
    return folder


def compile_one(card: Gpu, binary: Binary) -> str:
    """Compile by launching; what went wrong, or nothing."""
    torch.set_num_threads(1)
    try:
        form = Scheme.parse(binary.scheme)
        sizes, features = ([96] if binary.parts == 1 else [64, 32]), 256
        codes = torch.zeros(form.codes_shape(96, features), dtype=form.code_dtype)
        codebooks = torch.zeros(len(sizes), *form.codebooks_shape, dtype=binary.dtype)
        blocks = launch.pack(codes, codebooks, torch.ones(96, dtype=binary.dtype), sizes)
        x = torch.zeros(max(1, binary.config.tokens), features, dtype=binary.dtype)
        if binary.config.kernel == "rows":
            launch.rows(blocks, torch.zeros(8, dtype=torch.int64), sizes, features, binary.dtype)
        elif binary.config == DENSE:
            launch.multiply_decoded(x, blocks, None, sizes)
        else:
            launch.launch(binary.config, x, blocks, None, sizes)
    except Exception as error:
        return f"{binary}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def pack(cache: Path, archive: Path) -> None:
    """What a launch needs of a cache, without what is only for reading."""
    files = [file for file in sorted(cache.rglob("*")) if file.suffix in KEPT]
    with tarfile.open(archive, "w:gz") as target:
        for file in files:
            target.add(file, file.relative_to(cache))
    print(f"{len(files)} files, {archive.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Compile all. The exit code is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--sms", type=int, default=132)
    parser.add_argument("--capability", type=int, nargs=2, default=(9, 0))
    parser.add_argument("--name", default="NVIDIA H100 80GB HBM3")
    parser.add_argument("--pack", type=Path, help="then write the cache to this archive")
    options = parser.parse_args()
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or sys.exit("set TRITON_CACHE_DIR"))
    started, known = time.monotonic(), sum(1 for _ in cache.glob("*"))
    card = Gpu(options.name, tuple(options.capability), options.sms)
    install(card)
    wanted = binaries(card)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.jobs, mp_context=fork) as pool:
        found = list(pool.map(partial(compile_one, card), wanted))
    wrong = [trouble for trouble in found if trouble]
    print("\n".join(wrong))
    new = sum(1 for _ in cache.glob("*")) - known
    seconds = time.monotonic() - started
    print(f"{len(wanted)} binaries, {new} new entries, {len(wrong)} failed, {seconds:.0f} s")
    if options.pack:
        pack(cache, options.pack)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
