"""The C library against float64, on every instruction set, with partitions, tails and threads."""

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt_kernels import aqlm_linear, has_fast_kernel, reference
from pvrt_kernels.cpu import layouts, products, rounding
from pvrt_kernels.cpu import library as cpu
from pvrt_kernels.cpu.decoder_program import Program, Rounded, Step
from pvrt_kernels.packed import aqlm_pack, aqlm_packed_linear
from tests.fixtures.fused import exact, fused, packed
from tests.fixtures.instruction_sets import SOURCES, compiled, natively, relative, using
from tests.fixtures.turning import turning

HERE = Path(__file__).parent
SCHEMES = ["2x8g8", "1x8g8", "1x8g4", "4x8g8", "2x8g16", "1x7g8", "17x8g8", "1x16g8", "1x12g16"]
PARTITIONS = [[200], [64, 40, 130]]
needs_library = pytest.mark.skipif(cpu.library() is None, reason="the C library is not built")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_those_of_float64(isa: str, scheme: str) -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    for (number, sizes), in_features in product(enumerate(PARTITIONS), (48, 13 * 16)):
        layer = fused(scheme, sizes, in_features, dtypes[(number + in_features) % 3])
        assert layer.bias is not None
        weight, dense = packed(layer, sizes), exact(layer, sizes)
        for tokens in (1, 2, 3, 9):
            x = torch.randn(tokens, in_features)
            expected = x.double() @ dense.T + layer.bias.double()
            y = aqlm_packed_linear(x, weight, layer.bias)
            assert relative(y, expected) < rounding.relative_error()
            y = aqlm_linear(x, layer.codes, layer.codebooks, layer.scales, layer.bias, sizes)
            assert relative(y, expected) < rounding.FP32_RELATIVE
    decoded = weight.dequantize()
    assert decoded.dtype == layer.codebooks.dtype
    assert relative(decoded, dense) < torch.finfo(decoded.dtype).eps


# What is hard on tables of 16 bits: one input sets the step of its block, results cancel, books are
# far from zero (each table loses its minimum).
def outlier(layer: QuantizedLayer, x: Tensor) -> None:
    x[:, 77] = 1000.0


def cancelling(layer: QuantizedLayer, x: Tensor) -> None:
    pairs = x.view(len(x), -1, 2, layer.codebooks.shape[-1])
    pairs[:, :, 1] = -pairs[:, :, 0]
    layer.codes[:, 1::2] = layer.codes[:, ::2]


def far_books(layer: QuantizedLayer, x: Tensor) -> None:
    layer.codebooks.add_(30 * layer.codebooks.std())
    x.abs_()


def ordinary(layer: QuantizedLayer, x: Tensor) -> None:
    pass


def share_of_bound(data: Callable[[QuantizedLayer, Tensor], None], scheme: str) -> float:
    """The largest error over its stated bound, of tokens alone and together."""
    sizes = [64, 40, 130]
    layer = fused(scheme, sizes, 208, torch.float32)
    x = torch.randn(9, 208)
    data(layer, x)
    assert layer.bias is not None
    given = layer.codes, layer.codebooks, layer.scales, layer.bias, sizes
    expected = x.double() @ exact(layer, sizes).T + layer.bias.double()
    weight = packed(layer, sizes)
    alone = torch.cat([aqlm_packed_linear(row[None], weight, layer.bias) for row in x])
    both = torch.stack([alone, aqlm_packed_linear(x, weight, layer.bias)])
    return float(((both.double() - expected).abs() / rounding.product_bound(x, *given)).max())


@pytest.mark.parametrize(
    ("data", "scheme", "isa"),
    turning(
        [ordinary, outlier, cancelling, far_books],
        ["2x8g8", "1x7g4", "17x8g8"],
        cpu.INSTRUCTION_SETS,
    ),
    indirect=["isa"],
)
def test_no_output_is_farther_off_than_the_stated_bound(
    isa: str, data: Callable[[QuantizedLayer, Tensor], None], scheme: str
) -> None:
    assert share_of_bound(data, scheme) <= 1


@pytest.mark.parametrize("scheme", ["2x8g8", "1x7g4"])
def test_the_stated_bound_is_near_what_happens(isa: str, scheme: str) -> None:
    """Where one input makes most of the sums, errors have no chance to cancel."""
    assert share_of_bound(outlier, scheme) > 0.03
    assert cpu.table_rounding() == 0 or share_of_bound(ordinary, scheme) > 0.03


@pytest.mark.parametrize("scheme", ["2x8g8", "1x8g4"])
def test_one_tokens_result_is_its_own_among_others_within_the_bound(isa: str, scheme: str) -> None:
    """How many neighbours there are changes roundings; what they are changes nothing."""
    layer = fused(scheme, [200], 208, torch.float32)
    weight, x = packed(layer, [200]), torch.randn(11, 208)
    alone = torch.cat([aqlm_packed_linear(row[None], weight) for row in x])
    for tokens in (2, 3, 8, 10, 11):
        together = aqlm_packed_linear(x[:tokens], weight)
        assert relative(together, alone[:tokens]) < rounding.relative_error()
        x[1:] = x[1:].roll(1, 0)  # other neighbours, at other places
        assert torch.equal(aqlm_packed_linear(x[:tokens], weight)[0], together[0])
        x[1:] = x[1:].roll(-1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["2x8g8", "1x7g4", "17x8g8"])
def test_the_model_of_avx512_computes_what_the_instructions_do(modelled: Path, scheme: str) -> None:
    if "avx512-vbmi" not in natively():
        pytest.skip("no AVX-512 with VBMI here")
    layer, x = fused(scheme, [200], 208, torch.float32), torch.randn(1, 208)
    weight, found = packed(layer, [200]), []
    for library in (cpu.LIBRARY, modelled):
        with using("avx512-vbmi", library):
            found.append(aqlm_packed_linear(x, weight))
    assert torch.equal(*found)


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
    stored = weight.tensors
    assert isinstance(
        stored, layouts.CpuTiles if layer.codes.element_size() == 1 else layouts.CpuWords
    )
    assert stored.codes.nbytes == layer.codes.nbytes * padding
    assert stored.codes.data_ptr() != layer.codes.data_ptr()


@needs_library
def test_short_codes_in_a_long_type_are_packed_as_short_ones() -> None:
    layer = fused("2x8g8", [40], 64, torch.float32)
    wide = aqlm_pack(layer.codes.short(), layer.codebooks, layer.scales, torch.float32, [40])
    assert wide is not None and isinstance(wide.tensors, layouts.CpuTiles)
    x = torch.randn(2, 64)
    assert torch.equal(aqlm_packed_linear(x, wide), aqlm_packed_linear(x, packed(layer, [40])))


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


def test_threads_change_nothing(isa: str) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_are_silent(tmp_path: Path, sanitizer: str) -> None:
    driver = compiled(
        tmp_path / "driver",
        "-g",
        "-O1",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        str(HERE / "tsan_driver.c"),
        "-lpthread",
    )
    # Threads keep their scratch until they end, as those of OpenMP never do.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(driver)], env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address layout")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data race" not in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_products_of_sixteen_bit_weights_are_summed_in_fp32(
    isa: str, dtype: torch.dtype
) -> None:
    for rows in (1, 2, 63, 150):
        weight, x = torch.randn(rows, 77).to(dtype), torch.randn(3, 77)
        y = products.dense_linear(x, weight)
        # 77 products and sums, each rounded to 24 bits; an output may be near 0.
        bound = 77 * 2**-24 * (x.abs().double() @ weight.abs().double().T)
        assert bool(((y - x.double() @ weight.double().T).abs() <= bound).all())


@pytest.mark.parametrize(
    ("share", "dim", "isa"),
    turning([1, 2, 3, 4, 7], [12, 64, 88], cpu.INSTRUCTION_SETS),
    indirect=["isa"],
)
def test_attention_of_heads_that_share_keys_is_that_of_float64(
    isa: str, share: int, dim: int
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
        assert relative(y[0], (scores.softmax(-1) @ values).flatten()) < rounding.FP32_RELATIVE


@pytest.mark.parametrize(
    ("scheme", "dtype", "isa"),
    turning(
        ["2x8g8", "3x7g4", "1x16g8"],
        [torch.float32, torch.float16, torch.bfloat16],
        cpu.INSTRUCTION_SETS,
    ),
    indirect=["isa"],
)
def test_decoding_is_the_reference_to_the_bit(isa: str, scheme: str, dtype: torch.dtype) -> None:
    sizes = [64, 40, 130]
    layer = fused(scheme, sizes, 48, dtype)
    given = layer.codes, layer.codebooks, layer.scales, sizes
    assert products.can_decode(layer.codes, layer.codebooks)
    assert torch.equal(products.dequantize(*given), reference.dequantize(*given))


@needs_library
@pytest.mark.parametrize("name", ["avx512", "neon"])
def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """AVX-512 without VBMI among them: its gathers are slower than AVX2's loads."""
    cpu.library.cache_clear()
    monkeypatch.setenv("PVRT_CPU_ISA", name)
    with pytest.raises(ValueError, match=f"PVRT_CPU_ISA is '{name}', .*choose from .*portable"):
        cpu.library()
    monkeypatch.undo()
    assert cpu.instruction_set() in cpu.INSTRUCTION_SETS


@needs_library
def test_the_scheme_of_published_models_has_a_fast_kernel() -> None:
    assert has_fast_kernel("cpu", 2, 8, 8)
    assert not has_fast_kernel("cpu", 2, 8, 8, 4)


@pytest.mark.slow
def test_without_the_library_one_warning_names_the_remedy() -> None:
    script = (
        "from pathlib import Path\n"
        "import sys, warnings, torch\n"
        "import pvrt_kernels.cpu.library as cpu\n"
        "from pvrt_kernels.cpu import products\n"
        "from pvrt_kernels import has_fast_kernel, aqlm_linear\n"
        "from pvrt_kernels.dispatch import registry\n"
        "alone = registry.using(); alone.__enter__(); cpu.library.cache_clear()\n"
        "cpu.LIBRARY = Path('/nonexistent/libpvrt_cpu.so'); products.register()\n"
        "assert cpu.instruction_set() is None\n"
        "assert not has_fast_kernel('cpu', 2, 8, 8)\n"
        "codes, books = torch.zeros(8, 2, 2, dtype=torch.int8), torch.ones(2, 256, 1, 8)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        y = aqlm_linear(torch.ones(1, 16), codes, books, torch.ones(8, 1, 1, 1))\n"
        "assert bool((y == 32).all())\n"
        "said = [str(w.message) for w in caught if 'kernel' in str(w.message)]\n"
        "assert len(said) == 1 and 'apt-get install gcc' in said[0], said\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{SOURCES.parents[2]}:{HERE.parents[2]}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_the_package_builds_without_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [*command, *places],
        cwd=HERE.parents[2],
        env={**os.environ, "CC": "/nonexistent/cc"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "libpvrt_cpu" in done.stdout + done.stderr  # says what it could not build
    assert not list(tmp_path.rglob("*.so"))


def test_a_new_library_takes_the_old_ones_place_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that start during `build_ext --inplace` must not load half of it, or find none."""
    new, old, seen = tmp_path / "new.so", tmp_path / "lib.so", []
    new.write_bytes(b"new")
    old.write_bytes(b"old")
    replace = os.replace

    def note(source: str, target: str) -> None:
        seen.append((Path(source).read_bytes(), Path(target).read_bytes()))
        replace(source, target)

    setuptools = importlib.import_module("setuptools")  # by its name: it brings no types
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.setattr(os, "replace", note)
    build = runpy.run_path(str(HERE.parents[2] / "setup.py"))["BuildLibrary"]
    build(setuptools.Distribution()).copy_file(str(new), str(old))
    assert seen == [(b"new", b"old")]
    assert old.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 2
