"""The C library against float64, on every instruction set, with partitions, tails and threads."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pvrt.checkpoint import QuantizedLayer
from pvrt.scheme import Scheme
from pvrt_kernels import aqlm_linear, cpu, dispatch, reference
from pvrt_kernels.packed import PackedWeight, aqlm_pack, aqlm_packed_linear
from pvrt_kernels.program import Program, Rounded, Step
from tests.fixtures.toy import random_layer

HERE = Path(__file__).parent
SOURCES = cpu.LIBRARY.parent
COMPILER = shutil.which(os.environ.get("CC", "cc"))
SCHEMES = ["2x8g8", "1x8g8", "1x8g4", "4x8g8", "2x8g16", "1x7g8", "17x8g8", "1x16g8", "1x12g16"]
PARTITIONS = [[200], [64, 40, 130]]
needs_library = pytest.mark.skipif(cpu.library() is None, reason="the C library is not built")


def compiled(target: Path, *arguments: str) -> Path:
    """What the system's compiler makes of the library's sources; skips where there is none."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    files = [str(file) for file in sorted(SOURCES.glob("cpu*.c"))]
    flags = ["-std=c11", "-I", str(SOURCES), "-o", str(target), *arguments]
    done = subprocess.run([COMPILER, *flags, *files, "-lm"], capture_output=True, text=True)
    if done.returncode and "sanitize" in done.stderr + " ".join(arguments):
        pytest.skip(f"no ThreadSanitizer: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with its AVX-512 kernels on a scalar model of the instructions."""
    header = f'-DPVRT_MODEL_AVX512="{HERE / "avx512_model.h"}"'
    target = tmp_path_factory.mktemp("cpu") / "libmodelled.so"
    return compiled(target, "-O1", "-shared", "-fPIC", header)


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512-vbmi"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One instruction set after the other, modelled where this CPU lacks it."""
    name: str = request.param
    lib = cpu.library()
    if lib is None:
        pytest.skip("the C library is not built")
    if lib.pvrt_use_isa(name.encode()) is None:
        if not name.startswith("avx512") or not lib.pvrt_use_isa(b"avx2"):
            pytest.skip(f"no {name} here, nor the AVX2 that its model builds on")
        monkeypatch.setattr(cpu, "LIBRARY", request.getfixturevalue("modelled"))
        cpu.library.cache_clear()
        assert cpu.library().pvrt_use_isa(name.encode()) == name.encode()
    yield name
    monkeypatch.undo()
    cpu.library.cache_clear()
    cpu.library().pvrt_use_isa(b"")


def fused(scheme: str, sizes: list[int], in_features: int, dtype: torch.dtype) -> QuantizedLayer:
    """Several random layers as one, with a bias; codebooks [P, ...]."""
    parts = [random_layer(Scheme.parse(scheme), n, in_features, seed=n, dtype=dtype) for n in sizes]
    return QuantizedLayer(
        torch.cat([part.codes for part in parts]),
        torch.stack([part.codebooks for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.randn(sum(sizes)),
    )


def exact(layer: QuantizedLayer, sizes: list[int]) -> Tensor:
    """The weight in float64."""
    books, scales = layer.codebooks.float(), torch.ones_like(layer.scales).float()
    weight = reference.dequantize(layer.codes, books, scales, sizes).double()
    return weight * layer.scales.double().reshape(-1, 1)


def packed(layer: QuantizedLayer, sizes: list[int]) -> PackedWeight:
    weight = aqlm_pack(layer.codes, layer.codebooks, layer.scales, torch.float32, sizes)
    assert weight is not None
    return weight


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_those_of_float64(kernels: str, scheme: str) -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    for (number, sizes), in_features in product(enumerate(PARTITIONS), (48, 13 * 16)):
        layer = fused(scheme, sizes, in_features, dtypes[(number + in_features) % 3])
        assert layer.bias is not None
        weight, dense = packed(layer, sizes), exact(layer, sizes)
        limit = 1e-4 if kernels == "avx512-vbmi" else 2e-6
        for tokens in (1, 2, 3, 9):
            x = torch.randn(tokens, in_features)
            expected = x.double() @ dense.T + layer.bias.double()
            assert relative(aqlm_packed_linear(x, weight, layer.bias), expected) < limit
            y = aqlm_linear(x, layer.codes, layer.codebooks, layer.scales, layer.bias, sizes)
            assert relative(y, expected) < 2e-6
    decoded = weight.dequantize()
    assert decoded.dtype == layer.codebooks.dtype
    assert relative(decoded, dense) < torch.finfo(decoded.dtype).eps


def test_sixteen_bit_tables_keep_outliers(kernels: str) -> None:
    """One input a thousand times as large as the others sets the scale of its own block only."""
    layer = fused("2x8g8", [128], 512, torch.float32)
    x = torch.randn(1, 512)
    x[0, 77] = 1000.0
    y = aqlm_packed_linear(x, packed(layer, [128]))
    assert relative(y, x.double() @ exact(layer, [128]).T) < 1e-4


@needs_library
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packing_gives_everything_back_and_costs_no_second_copy(scheme: str) -> None:
    sizes = [64, 40, 130]
    layer = fused(scheme, sizes, 13 * 16, torch.float16)
    weight = packed(layer, sizes)
    codes, books, scales = weight.unpack()
    assert torch.equal(codes, layer.codes)
    assert torch.equal(books, layer.codebooks)
    assert torch.equal(scales, layer.scales)
    padding = {1: (64 + 64 + 192) / sum(sizes), 2: 1.0}[layer.codes.element_size()]
    assert weight.tensors[0].nbytes == layer.codes.nbytes * padding
    assert weight.tensors[0].data_ptr() != layer.codes.data_ptr()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["2x8g8", "1x16g8"])
def test_sixteen_bit_activations_are_rounded_once(scheme: str, dtype: torch.dtype) -> None:
    layer = fused(scheme, [96], 64, dtype)
    x = torch.randn(2, 3, 64).to(dtype)
    expected = (x.double() @ exact(layer, [96]).T).to(dtype)
    for y in (
        aqlm_packed_linear(x, packed(layer, [96])),
        aqlm_linear(x, layer.codes, layer.codebooks, layer.scales, None, [96]),
    ):
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


@needs_library
def test_threads_change_nothing() -> None:
    """The public numba kernel is wrong in half of such runs: its threads share one output."""
    layer = fused("2x8g8", [576], 576, torch.float16)
    weight = packed(layer, [576])
    before = torch.get_num_threads()
    try:
        for tokens in (1, 8, 40):
            x = torch.randn(tokens, 576)
            torch.set_num_threads(1)
            alone = aqlm_packed_linear(x, weight)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert all(torch.equal(aqlm_packed_linear(x, weight), alone) for _ in range(20))
    finally:
        torch.set_num_threads(before)


def test_no_races_under_thread_sanitizer(tmp_path: Path) -> None:
    driver = compiled(
        tmp_path / "driver",
        "-g",
        "-O1",
        "-fsanitize=thread",
        str(HERE / "tsan_driver.c"),
        "-lpthread",
    )
    done = subprocess.run([str(driver)], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address layout")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data race" not in done.stderr


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_products_of_sixteen_bit_weights_are_summed_in_fp32(
    kernels: str, dtype: torch.dtype
) -> None:
    for rows in (1, 2, 63, 150):
        weight, x = torch.randn(rows, 77).to(dtype), torch.randn(3, 77)
        y = cpu.dense_linear(x, weight)
        assert relative(y, x.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("dim", [12, 64, 88])
@pytest.mark.parametrize("share", [1, 2, 3, 4, 7])
def test_attention_of_heads_that_share_keys_is_that_of_float64(
    kernels: str, share: int, dim: int
) -> None:
    """Program.attend, one token after earlier ones; nothing is rotated."""
    for position in (0, 1, 8, 40, 101):
        heads = 2 * share
        x, y = torch.randn(1, (heads + 4) * dim), torch.empty(1, heads * dim)
        queries, key, value = torch.split(x[0].clone().view(-1, dim).double(), [heads, 2, 2])
        cache = torch.randn(1, 2, 2, position + 3, dim)
        program, same = Program(), torch.eye(heads * dim)
        program.attend(x, y, heads=heads, kv_heads=2, dim=dim, scale=dim**-0.5)
        program.logits(y, y.clone(), same, torch.ones(heads * dim), 1e-5, Rounded(same))
        program.rotate(torch.ones(position + 1, dim), torch.zeros(position + 1, dim))
        program.run([Step(0, position, cache)])
        keys, values = cache[0, :, :, : position + 1].double()
        assert torch.equal(keys[:, -1], key) and torch.equal(values[:, -1], value)
        scores = queries.view(2, share, dim) @ keys.transpose(1, 2) * dim**-0.5
        assert relative(y[0], (scores.softmax(-1) @ values).flatten()) < 2e-6


@needs_library
@pytest.mark.parametrize("scheme", ["2x8g8", "3x7g4", "1x16g8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_is_the_reference_to_the_bit(
    kernels: str, scheme: str, dtype: torch.dtype
) -> None:
    sizes = [64, 40, 130]
    layer = fused(scheme, sizes, 48, dtype)
    given = layer.codes, layer.codebooks, layer.scales, sizes
    assert cpu.can_decode(layer.codes, layer.codebooks)
    assert torch.equal(cpu.dequantize(*given), reference.dequantize(*given))


@needs_library
def test_the_scheme_of_published_models_has_a_fast_kernel() -> None:
    assert dispatch.has_fast_kernel("cpu", 2, 8, 8)
    assert not dispatch.has_fast_kernel("cpu", 2, 8, 8, 4)


def test_without_the_library_one_warning_names_the_remedy() -> None:
    script = (
        "from pathlib import Path\n"
        "import sys, warnings, torch\n"
        "import pvrt_kernels.cpu as cpu\n"
        "from pvrt_kernels import dispatch, aqlm_linear\n"
        "dispatch.unregister('cpu'); dispatch._packed_kernels.clear(); cpu.library.cache_clear()\n"
        "cpu.LIBRARY = Path('/nonexistent/libpvrt_cpu.so'); cpu.register()\n"
        "assert cpu.instruction_set() is None\n"
        "assert not dispatch.has_fast_kernel('cpu', 2, 8, 8)\n"
        "codes, books = torch.zeros(8, 2, 2, dtype=torch.int8), torch.ones(2, 256, 1, 8)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        y = aqlm_linear(torch.ones(1, 16), codes, books, torch.ones(8, 1, 1, 1))\n"
        "assert bool((y == 32).all())\n"
        "said = [str(w.message) for w in caught if 'kernel' in str(w.message)]\n"
        "assert len(said) == 1 and 'apt-get install gcc' in said[0], said\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{SOURCES.parent}:{HERE.parents[1]}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_the_package_builds_without_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [*command, *places],
        cwd=HERE.parents[1],
        env={**os.environ, "CC": "/nonexistent/cc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "libpvrt_cpu" in done.stdout + done.stderr  # says what it could not build
    assert not list(tmp_path.rglob("*.so"))
