"""GPU kernels in Triton's interpreter, against the reference in float64. Run by test_choose.py.

Needs TRITON_INTERPRET=1 before anything imports Triton: pytest tests/kernels/gpu/interpreted.py
alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from pvrt.format.scheme import Scheme
from pvrt_kernels import reference
from pvrt_kernels.dispatch import registry
from pvrt_kernels.gpu import choose, launch
from pvrt_kernels.gpu.choose import LaunchConfig
from pvrt_kernels.gpu.layout import pack_codes, unpack_codes
from pvrt_kernels.gpu.shared import shared
from pvrt_kernels.packed import PackedWeight, aqlm_pack, aqlm_packed_linear, aqlm_packed_rows

HALF, BFLOAT = torch.float16, torch.bfloat16
# Relative error of a product: one rounding of its sums, one of each weight (tile and dense). The
# interpreter cuts float32 off at bfloat16 instead of rounding.
TOLERANCE = {HALF: 4e-4, BFLOAT: 8e-3, torch.float32: 1e-6}


def multiply_in_float32(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter keeps bfloat16 as bits and would multiply those."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = widen(a), widen(b)
    return exact_dot(self, a, b, *rest)


def widen(handle: Any) -> Any:
    bits = handle.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


exact_dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = multiply_in_float32


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choose, "user_table", lambda name: Path("/nonexistent"))
    with registry.using(replace(launch.KERNEL, supports=lambda problem: True)):
        yield


@dataclass
class Case:
    """A random fused layer, packed, as the tensors of that, and as a float64 weight."""

    packed: PackedWeight
    blocks: launch.GpuBlocks
    weight: Tensor
    parts: tuple[Tensor, Tensor, Tensor]


def case(scheme: str, sizes: list[int], in_features: int, dtype: torch.dtype = HALF) -> Case:
    form = Scheme.parse(scheme)
    torch.manual_seed(in_features)
    codes = torch.randint(0, form.codebook_size, form.codes_shape(sum(sizes), in_features))
    codes = codes.to(form.code_dtype)
    codebooks = torch.randn(len(sizes), *form.codebooks_shape).to(dtype)
    scales = (torch.rand(form.scales_shape(sum(sizes))) + 0.5).to(dtype)
    packed = aqlm_pack(codes, codebooks, scales, dtype, sizes)
    assert packed is not None
    weight = reference.dequantize(codes, codebooks.double(), scales.double(), sizes)
    # `reference` sums in float32; exact enough against sixteen bits, and done again for float32
    assert isinstance(packed.tensors, launch.GpuBlocks)
    return Case(packed, packed.tensors, weight.double(), (codes, codebooks, scales))


def error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    return float((y.double() - expected).norm() / expected.norm())


def run(
    config: LaunchConfig, layer: Case, tokens: int, dtype: torch.dtype, bias: bool = False
) -> None:
    packed, sizes = layer.blocks, layer.packed.partition_sizes
    x = torch.randn(tokens, layer.packed.in_features).to(dtype)
    b = torch.randn(sum(sizes)).to(dtype) if bias else None
    for _ in range(min(config.split, 2)):  # the second finds the workspace as the first left it
        y = launch.launch(config, x, packed, b, sizes)
        assert error(y, x, layer.weight, b) < TOLERANCE[dtype], (config, tokens)
    sums, arrived = shared.workspace(torch.device("cpu"), 1, 1)
    assert not sums.any()
    assert not arrived.any()


@pytest.mark.parametrize(
    "scheme", ["2x8g8", "1x16g8", "1x16g16", "1x8g4", "4x8g8", "3x8g8", "5x8g4", "6x8g16", "3x12g8"]
)
@pytest.mark.parametrize("in_features", [96, 176])
def test_packing_turns_back_into_the_checkpoints_tensors(scheme: str, in_features: int) -> None:
    layer = case(scheme, [5, 6], in_features)
    for ours, theirs in zip(layer.packed.unpack(), layer.parts, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    blocks = layer.blocks.codes
    assert blocks.is_contiguous()
    stored = blocks.numel() + layer.blocks.rest.numel()
    spare = stored - layer.parts[0].numel() * layer.parts[0].element_size()
    assert 0 <= spare < 24 * 11  # less than a block per row


def test_signed_codes_are_packed_as_indices() -> None:
    codes = torch.tensor([[[-1], [127], [-128], [5]]], dtype=torch.int8)
    assert pack_codes(codes, 256)[0, 0, :5].tolist() == [255, 127, 128, 5, 0]
    assert pack_codes(codes, 128)[0, 0, :5].tolist() == [127, 127, 0, 5, 0]
    assert torch.equal(unpack_codes(pack_codes(codes, 256), 4, 1, 256), codes)


# Rows that end inside a tile, inputs that end inside a block, fused layers, every split.
@pytest.mark.parametrize(
    ("scheme", "sizes", "in_features", "dtype"),
    [
        ("2x8g8", [70], 136, HALF),
        ("2x8g8", [70, 33, 5], 136, BFLOAT),
        ("1x8g8", [70, 64], 72, HALF),
        ("1x8g4", [33], 72, BFLOAT),
        ("4x8g8", [65], 48, HALF),
        ("4x8g16", [65], 80, HALF),
        ("2x8g4", [65], 72, HALF),
        ("3x8g8", [65, 9], 72, BFLOAT),
        ("3x8g4", [65], 36, HALF),
        ("5x8g8", [65, 9], 56, HALF),
        ("5x8g16", [65], 80, HALF),
        ("6x7g8", [65], 72, HALF),
        ("2x7g8", [65], 72, HALF),
        ("2x8g32", [65], 160, HALF),
    ],
)
def test_table_lookups(scheme: str, sizes: list[int], in_features: int, dtype: torch.dtype) -> None:
    layer = case(scheme, sizes, in_features, dtype)
    for split in (1, 2):
        run(LaunchConfig("lut", 1, 64, 4, split), layer, 1, dtype, bias=split == 2)


@pytest.mark.parametrize(
    ("scheme", "sizes", "in_features", "dtype"),
    [
        ("1x16g8", [70, 9], 136, HALF),
        ("1x16g16", [20], 144, BFLOAT),
        ("2x12g8", [20], 72, HALF),
        ("3x12g8", [20, 3], 72, HALF),
        ("5x16g8", [20], 40, HALF),
        ("5x8g8", [20, 3], 72, torch.float32),
        ("6x8g4", [20], 36, HALF),
        ("2x8g8", [20, 3, 7], 72, HALF),
        ("1x8g4", [40], 72, torch.float32),
    ],
)
def test_direct_decoding(
    scheme: str, sizes: list[int], in_features: int, dtype: torch.dtype
) -> None:
    layer = case(scheme, sizes, in_features, dtype)
    for tokens, split in ((1, 2), (3, 1)):
        compiled = 1 << (tokens - 1).bit_length()
        run(LaunchConfig("direct", compiled, 32, 4, split), layer, tokens, dtype, bias=tokens == 3)


@pytest.mark.parametrize(
    ("scheme", "sizes", "in_features", "dtype"),
    [
        ("2x8g8", [70, 33, 5], 136, BFLOAT),
        ("1x16g8", [70], 136, HALF),
        ("1x16g16", [70], 144, HALF),
        ("1x8g4", [70], 72, HALF),
        ("4x8g16", [70], 80, BFLOAT),
        ("3x8g16", [70, 3], 80, HALF),
        ("5x8g8", [70], 72, HALF),
        ("6x12g4", [70], 36, HALF),
    ],
)
def test_tiles_on_tensor_cores(
    scheme: str, sizes: list[int], in_features: int, dtype: torch.dtype
) -> None:
    layer = case(scheme, sizes, in_features, dtype)
    for tokens, compiled, split in ((5, 8, 2), (16, 16, 1), (37, 32, 1)):
        run(LaunchConfig("tile", compiled, 64, 4, split), layer, tokens, dtype, bias=tokens == 5)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, torch.float32])
def test_decoding_whole_weights_rounds_once(dtype: torch.dtype) -> None:
    for scheme in ("2x8g8", "4x8g8", "1x16g16", "3x8g4", "5x8g8", "6x12g16"):
        layer = case(scheme, [70, 33], 144, dtype)
        exact = reference.dequantize(*layer.parts, [70, 33])
        ours = layer.packed.dequantize()
        if dtype == BFLOAT:
            torch.testing.assert_close(ours, exact, rtol=2**-7, atol=0)
        else:
            assert torch.equal(ours, exact)


@pytest.mark.parametrize("scheme", ["2x8g4", "3x8g4", "5x8g8", "1x16g8", "6x12g16"])
def test_rows_by_their_numbers(scheme: str) -> None:
    for sizes in ([203], [70, 33, 1, 99]):
        layer = case(scheme, sizes, 144)
        exact = reference.dequantize(*layer.parts, sizes)
        ids = torch.tensor([[0, 202, 69, 70], [103, 104, 202, 0]])
        for rows in (ids, ids.int(), ids.T, torch.randint(0, 203, (301,))[1:], ids[:0]):
            assert torch.equal(aqlm_packed_rows(layer.packed, rows, HALF), exact[rows.long()])


@pytest.mark.parametrize("scheme", ["2x8g4", "3x8g4", "5x8g8", "6x12g16"])
def test_a_row_that_is_not_there_is_nan_where_nothing_can_be_raised(scheme: str) -> None:
    layer = case(scheme, [70, 33], 144)
    numbers = torch.tensor([5, -1, 103, 2**40, -(2**40), 102])
    y = launch.rows(layer.blocks, numbers, [70, 33], 144, HALF)
    assert y.isnan().all(1).tolist() == [False, True, True, True, True, False]
    assert not y[0].isnan().any() and not y[5].isnan().any()


def test_many_tokens_are_multiplied_in_pieces_of_the_scratch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 1)  # 128 rows at a time
    layer = case("2x8g8", [150, 120], 48)
    x, bias = torch.randn(3, 100, 48).to(HALF), torch.randn(270).to(HALF)
    monkeypatch.setattr(choose, "rules", lambda name: ())
    y = aqlm_packed_linear(x, layer.packed, bias)
    assert error(y, x, layer.weight, bias) < TOLERANCE[HALF]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, torch.float32])
def test_every_batch_size_through_the_public_op(dtype: torch.dtype) -> None:
    layer = case("2x8g8", [70, 33], 72, dtype)
    kernels = set()
    for tokens in (1, 3, 5, 33, 65, 300):
        x = torch.randn(1, tokens, 72).to(dtype)
        kernels.add(launch.config_for(x[0], layer.blocks).kernel)
        y = aqlm_packed_linear(x, layer.packed)
        assert y.shape == (1, tokens, 103)
        assert error(y, x, layer.weight) < TOLERANCE[dtype], tokens
    expected = {"direct", "dense"} if dtype == torch.float32 else {"lut", "direct", "tile", "dense"}
    assert kernels == expected
    assert aqlm_packed_linear(torch.zeros(0, 72).to(dtype), layer.packed).shape == (0, 103)


def test_sums_of_many_tokens_stay_within_the_cap_of_the_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, shape = choose.describe_gpu(torch.device("cpu")), choose.Shape(2, 256, 8, 70, 264)
    assert choose.choose(gpu, shape, 8, HALF, False).split > 1
    monkeypatch.setattr(choose, "MOST_SUMS", 500)
    with shared.fresh():
        layer = case("2x8g8", [70], 264)
        before = shared.workspace(torch.device("cpu"), 1, 1)
        assert before[0].numel() == 500
        for tokens, split in ((1, True), (4, True), (5, False), (33, False)):
            x = torch.randn(tokens, 264).to(HALF)
            assert (launch.config_for(x, layer.blocks).split > 1) == split, tokens
            assert error(aqlm_packed_linear(x, layer.packed), x, layer.weight) < TOLERANCE[HALF]
        assert shared.workspace(torch.device("cpu"), 1, 1) is before  # did not grow


def test_more_than_three_partitions() -> None:
    layer = case("2x8g8", [20, 8, 33, 5], 72)
    x, bias = torch.randn(2, 72).to(HALF), torch.randn(66).to(HALF)
    y = aqlm_packed_linear(x, layer.packed, bias)
    assert error(y, x, layer.weight, bias) < TOLERANCE[HALF]


def test_deterministic_mode_decodes_directly() -> None:
    layer = case("2x8g8", [40], 72)
    x = torch.randn(2, 72).to(HALF)
    torch.use_deterministic_algorithms(True)
    try:
        assert launch.config_for(x, layer.blocks).kernel == "direct"
        y = aqlm_packed_linear(x, layer.packed)
        assert torch.equal(y, aqlm_packed_linear(x, layer.packed))
    finally:
        torch.use_deterministic_algorithms(False)
    assert error(y, x, layer.weight) < TOLERANCE[HALF]


def test_other_layouts_of_x_and_gradients() -> None:
    layer = case("2x8g8", [40], 72)
    wide = torch.randn(2, 80).to(HALF)
    x = wide[:, 1:73]  # neither contiguous nor aligned
    assert error(aqlm_packed_linear(x, layer.packed), x, layer.weight) < TOLERANCE[HALF]
    for tokens in (2, 300):
        x = torch.randn(tokens, 72).to(HALF).requires_grad_(True)
        y = aqlm_packed_linear(x, layer.packed, torch.ones(40, dtype=HALF))
        (grad,) = torch.autograd.grad(y.sum(), x)
        expected = torch.ones(tokens, 40).double() @ layer.weight
        assert float((grad.double() - expected).norm() / expected.norm()) < TOLERANCE[HALF]


def test_warming_up_runs_every_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = case("2x8g8", [40], 72)
    seen = []
    real = launch.launch

    def note(config: LaunchConfig, *rest: Any) -> Tensor:
        seen.append((config.kernel, config.tokens))
        return real(config, *rest)

    monkeypatch.setattr(launch, "launch", note)
    with shared.fresh():
        for _ in range(2):
            launch.warm_up(layer.blocks, [40], 72, HALF, has_bias=False)
        assert not shared.is_new(
            torch.device("cpu"), "dense", layer.blocks.codebooks.shape[1:], HALF
        )
    tiles = [("tile", tokens) for tokens in (8, 16, 32, 64)]
    assert list(dict.fromkeys(seen)) == [("lut", 1), ("direct", 2), ("direct", 4), *tiles]
    assert len(seen) <= 8  # tiles of 64 tokens: of 64 rows, and for more tokens of 128


def test_a_model_of_transformers_runs_on_packed_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pvrt
    from pvrt.modules.whole_model import pack_model, quantized_layers
    from tests.fixtures.toy import write_toy

    monkeypatch.setattr(launch, "WARM_TOKENS", ())  # tested by itself, and slow here
    exact = write_toy(tmp_path, "qwen2", dtype=HALF)  # q, k and v have biases
    model = pvrt.load(tmp_path)
    pack_model(model, model.dtype)
    layers = quantized_layers(model)
    assert all(layer.packed is not None for layer in layers.values())
    assert len({id(layer.packed) for layer in layers.values()}) == 2 * 4  # per block: 4 products
    tokens = torch.tensor([[5, 77, 200, 9, 31]])
    with torch.no_grad():
        logits = model(tokens).logits.float()
        expected = exact(tokens).logits
    assert float((logits - expected).norm() / expected.norm()) < 5e-3
