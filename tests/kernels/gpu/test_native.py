"""The CUDA kernels without a GPU: compiled for the CPU and for every architecture."""

import ctypes
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pvrt.format.scheme import Scheme
from pvrt_kernels import reference
from pvrt_kernels.gpu import launch, native, nvrtc
from pvrt_kernels.gpu.choose import LaunchConfig
from tests.fixtures import aot

HERE = Path(__file__).parent
SOURCES = Path(native.__file__).parent / "csrc"
HALF, BFLOAT = torch.float16, torch.bfloat16
TOLERANCE = {HALF: 6e-4, BFLOAT: 3e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@lru_cache(maxsize=64)
def on_cpu(folder: Path, name: str, defined: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    library = folder / ("_".join([name, *(str(value) for _, value in defined)]) + ".so")
    flags = [f"-D{constant}={value}" for constant, value in defined]
    flags += [f"-DKERNEL={name}", f'-DSOURCE="{name}.cu"']
    command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", "-pthread", f"-I{SOURCES}"]
    subprocess.run([*command, *flags, str(HERE / "native_on_cpu.cpp"), "-o", library], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "sizes", "in_features", "dtype", "tokens", "split"),
    [
        ("2x8g8", [150], 136, HALF, 1, 1),
        ("2x8g8", [150, 133, 5], 392, BFLOAT, 1, 3),
        ("2x8g8", [150, 33], 392, HALF, 2, 2),
        ("2x8g8", [150], 264, HALF, 3, 1),
        ("1x8g8", [150], 520, HALF, 1, 2),
        ("4x8g8", [150], 136, BFLOAT, 1, 1),
        ("2x7g16", [150], 784, HALF, 1, 2),
        ("1x8g32", [150], 3200, HALF, 1, 1),
        ("4x8g16", [150], 400, HALF, 2, 1),
        ("2x8g8", [150, 20], 520, HALF, 4, 2),
        ("2x8g8", [150], 136, HALF, 5, 1),
        ("2x8g8", [150, 133, 5], 392, BFLOAT, 8, 3),
        ("2x8g8", [150, 20], 264, BFLOAT, 33, 2),
        ("2x8g8", [75], 520, HALF, 64, 4),
        ("1x8g8", [75], 520, HALF, 16, 2),
        ("4x8g8", [75], 136, BFLOAT, 12, 3),
        ("1x8g16", [75], 784, HALF, 9, 2),
        ("2x7g16", [75], 400, BFLOAT, 17, 1),
        ("4x8g16", [75, 33], 400, HALF, 64, 3),
    ],
)
def test_products(
    folder: Path,
    scheme: str,
    sizes: list[int],
    in_features: int,
    dtype: torch.dtype,
    tokens: int,
    split: int,
) -> None:
    form = Scheme.parse(scheme)
    torch.manual_seed(in_features)
    rows = sum(sizes)
    codes = torch.randint(0, form.codebook_size, form.codes_shape(rows, in_features))
    codebooks = torch.randn(len(sizes), *form.codebooks_shape).to(dtype)
    scales = (torch.rand(form.scales_shape(rows)) + 0.5).to(dtype)
    weight = reference.dequantize(codes, codebooks.double(), scales.double(), sizes)
    packed = launch.pack(codes.to(form.code_dtype), codebooks, scales, sizes)
    x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(rows).to(dtype)

    kernel = "lut_cuda" if tokens <= 4 else "tile_cuda"
    config = LaunchConfig(kernel, 1 << (tokens - 1).bit_length(), 128, 4, split)
    defined = native.constants(
        config, form.num_codebooks, form.codebook_size, form.in_group_size, dtype
    )
    library = on_cpu(folder, native.SOURCES[kernel], tuple(defined.items()))
    tiles = sum(-(-size // config.rows) for size in sizes)
    ends = [sum(sizes[: part + 1]) for part in range(len(sizes))] + [rows, rows]
    partial, arrived = torch.zeros(tokens, rows), torch.zeros(tiles, dtype=torch.int32)
    for _ in range(2):  # the second finds the workspace as the first left it
        y = torch.full((tokens, rows), torch.nan, dtype=dtype)
        tensors = (x, packed.codes, packed.codebooks, packed.scales, bias, y, partial, arrived)
        in_a_bank = library.run(
            *(pointer(tensor) for tensor in tensors),
            *(rows, in_features // form.in_group_size, packed.codes.shape[0], tokens),
            *(ends[0], ends[1], tiles, split),
        )
        expected = x.double() @ weight.double().T + bias.double()
        assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
        assert in_a_bank == 1
    assert not partial.any()
    assert not arrived.any()


def needs_nvrtc() -> None:
    reason = nvrtc.missing((9, 0))
    if reason is not None:
        pytest.skip(f"no NVRTC: {reason}")


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "tokens", "rows"),
    [
        *(("lut_cuda", 1, rows) for rows in (256, 512, 1024)),
        *(("lut_cuda", tokens, 512) for tokens in (2, 4)),
        *(("tile_cuda", tokens, 256) for tokens in (8, 16, 32, 64)),
    ],
)
def test_the_kernels_fit_every_architecture(
    architecture: int, kernel: str, tokens: int, rows: int
) -> None:
    needs_nvrtc()
    config = LaunchConfig(kernel, tokens, rows, 8)
    defined = native.constants(config, 2, 256, 8, BFLOAT)
    source = f"{native.SOURCES[kernel]}.cu"
    code = nvrtc.compile_source(source, defined, f"sm_{architecture}")
    binary = aot.read_binary(code, native.shared_bytes(config, 2, 8))
    assert binary.spill_bytes <= 128  # of a few registers; how many depends on NVRTC
    assert binary.registers * 256 * defined["BLOCKS"] <= aot.REGISTERS
    assert binary.shared_bytes <= aot.SHARED_LIMIT[architecture] << 10
    if kernel == "lut_cuda":  # one byte dot product and one load for each lookup
        lookups = 32 * (rows // 256)
        assert binary.count(r"IDP\.4A") == lookups
        assert binary.count(r"LDS") - lookups in range(12)


def test_a_source_that_does_not_compile_is_named() -> None:
    needs_nvrtc()
    config = LaunchConfig("lut_cuda", 1, 1024, 8)
    defined = native.constants(config, 2, 256, 8, HALF) | {"THREADS": 0}
    with pytest.raises(RuntimeError, match=r"lut_gemv.cu does not compile"):
        nvrtc.compile_source("lut_gemv.cu", defined, "sm_90")


def test_a_gpu_newer_than_nvrtc_and_a_machine_without_it_are_told_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs_nvrtc()
    assert nvrtc.missing((8, 6)) is None
    assert "older than the GPU" in str(nvrtc.missing((99, 0)))
    nvrtc.missing.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "cuda.bindings", None)
        assert "ModuleNotFoundError" in str(nvrtc.missing((9, 0)))
    nvrtc.missing.cache_clear()
