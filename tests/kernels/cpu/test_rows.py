"""Single rows of packed weights, and the decoder program that embeds and ends with them."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.scheme import Scheme
from pvrt_kernels import reference
from pvrt_kernels.cpu import layouts, rounding
from pvrt_kernels.cpu import library as cpu
from pvrt_kernels.cpu.decoder_program import Program, Rounded, Step
from pvrt_kernels.packed import PackedWeight, aqlm_pack, aqlm_packed_rows
from tests.fixtures.instruction_sets import natively, relative, using
from tests.fixtures.toy import random_layer

# of embeddings and heads, and others that the layouts take: short, long and many codes
SCHEMES = ["2x8g4", "5x8g8", "3x8g4", "2x8g8", "1x7g8", "6x8g16", "17x8g8", "1x16g8", "2x12g16"]
needs_library = pytest.mark.skipif(cpu.library() is None, reason="the C library is not built")


def packed(layer: QuantizedLayer) -> PackedWeight:
    weight = aqlm_pack(layer.codes, layer.codebooks, layer.scales, torch.float32)
    assert weight is not None
    return weight


def dense(layer: QuantizedLayer, dtype: torch.dtype) -> Tensor:
    """Sums in float32, rounded once to a dtype."""
    books, rows = layer.codebooks.unsqueeze(0).float(), len(layer.codes)
    return reference.dequantize(layer.codes, books, layer.scales, [rows]).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_those_of_the_decoded_weight_to_the_bit(
    isa: str, scheme: str, dtype: torch.dtype
) -> None:
    layer = random_layer(Scheme.parse(scheme), 203, 7 * 16, dtype=dtype)
    weight, expected = packed(layer), dense(layer, torch.float32)
    last = len(expected) - 1
    ids = torch.tensor([[0, last, 63, 64], [64, 127, last, 0]])
    many = torch.randint(0, len(expected), (300,))
    for rows in (ids, ids.int(), ids.T, ids[0, 1], many, ids[:0]):
        y = aqlm_packed_rows(weight, rows, torch.float32)
        assert torch.equal(y, expected[rows.long()])
        narrow = aqlm_packed_rows(weight, rows, torch.bfloat16)
        assert torch.equal(narrow, expected[rows.long()].bfloat16())


def test_rows_of_a_fused_weight_have_the_codebooks_of_their_own_layer(isa: str) -> None:
    sizes, scheme = [70, 1, 64], Scheme.parse("2x8g8")
    parts = [random_layer(scheme, n, 48, seed=n, dtype=torch.float16) for n in sizes]
    weight = aqlm_pack(
        torch.cat([part.codes for part in parts]),
        torch.stack([part.codebooks for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.float32,
        sizes,
    )
    assert weight is not None
    expected = torch.cat([dense(part, torch.float32) for part in parts])
    rows = torch.cat([torch.tensor([134, 69, 70, 71, 0]), torch.randint(0, 135, (200,))])
    assert torch.equal(aqlm_packed_rows(weight, rows, torch.float32), expected[rows])


@needs_library
@pytest.mark.parametrize("scheme", ["2x8g4", "1x16g8"])
@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_a_row_that_is_not_there_is_named(scheme: str, wrong: int) -> None:
    weight = packed(random_layer(Scheme.parse(scheme), 50, 32))
    with pytest.raises(IndexError, match=f"there is no row {wrong}: the weight has rows 0 to 49"):
        aqlm_packed_rows(weight, torch.tensor([[3, wrong, 60]]), torch.float32)


def one_layer(
    weight: PackedWeight | Tensor, hidden: Tensor, logits: Tensor, columns: Tensor | None = None
) -> Program:
    """A model of nothing but a tied embedding and head with a norm between them."""
    program = Program()
    program.embed(weight, hidden, scale=3.0, in_scales=columns)
    norm = torch.linspace(0.5, 1.5, hidden.shape[1])
    scores = Rounded(weight) if isinstance(weight, Tensor) else None
    program.logits(hidden, logits, weight, norm, 1e-5, scores)
    return program


def largest(logits: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each row is right in its largest logit, up to a tolerance of its size, and has no other."""
    slack = tolerance * expected.norm(dim=1)
    found = logits.argmax(1, keepdim=True)
    right = expected.gather(1, found)[:, 0]
    assert bool((right >= expected.amax(1) - slack).all())
    assert bool(((logits.gather(1, found)[:, 0] - right).abs() <= slack).all())


def no_change(x: Tensor, layer: QuantizedLayer) -> None:
    pass


def one_loud_input(x: Tensor, layer: QuantizedLayer) -> None:
    x[0, 17] = 1e4  # sets the step of its block of tables


def near_ties(x: Tensor, layer: QuantizedLayer) -> None:
    layer.codes[1::2] = layer.codes[::2]  # pairs of rows that differ in their scales
    layer.scales[1::2] = layer.scales[::2] * (1 + 2**-12)


def books_far_from_zero(x: Tensor, layer: QuantizedLayer) -> None:
    layer.codebooks.add_(30 * layer.codebooks.std())


def scales_of_both_signs(x: Tensor, layer: QuantizedLayer) -> None:
    layer.scales[::3] *= -2


@pytest.mark.parametrize("scheme", ["2x8g4", "3x8g4", "5x8g8", "17x8g8"])
@pytest.mark.parametrize(
    "change", [no_change, one_loud_input, near_ties, books_far_from_zero, scales_of_both_signs]
)
def test_the_largest_logit_is_found_whatever_the_data(
    isa: str, scheme: str, change: Callable[[Tensor, QuantizedLayer], None]
) -> None:
    for seed in range(40):  # a bound of 0 lets 1 in 20 of these tokens go wrong
        layer = random_layer(Scheme.parse(scheme), 1500, 48, seed=seed)
        x = torch.randn(3, 48)
        change(x, layer)
        logits, cache = torch.full((3, 1500), torch.nan), torch.empty(1, 2, 1, 1, 1)
        program, norm = Program(), torch.rand(48) + 0.5
        weight, hidden = packed(layer), torch.empty(3, 48)
        program.embed(x, hidden)
        program.logits(hidden, logits, weight, norm, 1e-5)
        program.run([Step(token, 0, cache) for token in range(3)], argmax_only=True)
        wide = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
        expected = wide * norm.double() @ dense(layer, torch.float32).double().T
        # only fp32 sums of the terms of one row are allowed
        largest(logits, expected, rounding.FP32_RELATIVE)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_program_embeds_and_ends_with_one_packed_weight(
    isa: str, scheme: str, threads: int
) -> None:
    layer = random_layer(Scheme.parse(scheme), 203, 9 * 16, dtype=torch.bfloat16)
    weight, exact = packed(layer), dense(layer, torch.float32)
    rows, before = 11, torch.get_num_threads()
    hidden, logits = torch.empty(rows, 144), torch.empty(rows, 203)
    columns = None if threads == 1 else torch.rand(144) + 0.5
    factor = 3 * (torch.ones(144) if columns is None else columns)
    program, cache = one_layer(weight, hidden, logits, columns), torch.empty(1, 2, 1, 1, 1)
    try:
        torch.set_num_threads(threads)
        for count in (1, 2, 3, 11):
            tokens = [202, 0, 63, 64, 202, *range(6)][:count]
            for argmax_only in (False, True):
                hidden.fill_(torch.nan), logits.fill_(torch.nan)
                program.run([Step(token, 0, cache) for token in tokens], argmax_only)
                assert torch.equal(hidden[:count], exact[tokens] * factor)
                x = hidden[:count].double()
                x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
                expected = x * torch.linspace(0.5, 1.5, 144).double() @ exact.double().T
                tolerance = rounding.relative_error() + 2 * rounding.FP32_RELATIVE
                if argmax_only:
                    largest(logits[:count], expected, tolerance)
                else:
                    assert relative(logits[:count], expected) < tolerance
                assert logits[count:].isnan().all()
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("token", [-1, 40])
def test_a_token_beyond_the_vocabulary_is_refused(quantised: bool, token: int) -> None:
    layer = random_layer(Scheme.parse("2x8g4"), 40, 32)
    weight = packed(layer) if quantised else dense(layer, torch.float32)
    program = one_layer(weight, torch.empty(2, 32), torch.empty(2, 40))
    cache = torch.empty(1, 2, 1, 1, 1)
    with pytest.raises(IndexError, match=f"no token {token}: the vocabulary has 0 to 39"):
        program.run([Step(3, 0, cache), Step(token, 0, cache)])


@needs_library
@pytest.mark.parametrize(("position", "angles"), [(-1, 4), (3, 4), (2, 2)])
def test_a_position_beyond_cache_or_angles_is_refused(position: int, angles: int) -> None:
    x, y = torch.zeros(1, 3 * 8), torch.zeros(1, 8)
    program, same = Program(), torch.eye(8)
    program.attend(x, y, heads=1, kv_heads=1, dim=8, scale=1)
    program.logits(y, y.clone(), same, torch.ones(8), 1e-5)
    program.rotate(torch.ones(angles, 8), torch.zeros(angles, 8))
    with pytest.raises(IndexError, match=f"no position {position}"):
        program.run([Step(0, position, torch.zeros(1, 2, 1, 3, 8))])


@needs_library
@pytest.mark.parametrize(
    "first, count, rows", [(0, 51, None), (-1, 2, None), (0, 1, [50]), (0, 2, [3, -1])]
)
def test_the_library_itself_refuses_rows_that_are_not_there(
    first: int, count: int, rows: list[int] | None
) -> None:
    weight = packed(random_layer(Scheme.parse("2x8g4"), 50, 32))
    assert isinstance(weight.tensors, layouts.CpuTiles)
    view = layouts.plain_view(weight.tensors, 32)
    numbers, y = torch.tensor(rows or [0]), torch.full((64, 32), 7.0)
    given = numbers.data_ptr() if rows else None
    decode = cpu.library().pvrt_decode_rows
    assert decode(ctypes.byref(view), given, first, count, y.data_ptr(), 1) == 1
    assert bool((y == 7).all())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["2x8g4", "17x8g8"])
def test_the_model_of_avx512_makes_the_rough_tables_of_the_instructions(
    modelled: Path, scheme: str
) -> None:
    if "avx512-vbmi" not in natively():
        pytest.skip("no AVX-512 with VBMI here")
    weight = packed(random_layer(Scheme.parse(scheme), 1500, 144))
    hidden, found, exact = torch.empty(1, 144), [], torch.empty(1, 1500)
    step = Step(7, 0, torch.empty(1, 2, 1, 1, 1))
    one_layer(weight, hidden, exact).run([step])
    for library in (cpu.LIBRARY, modelled):
        with using("avx512-vbmi", library):
            logits = torch.empty(1, 1500)
            one_layer(weight, hidden, logits).run([step], argmax_only=True)
            found.append(logits)
            assert relative(logits, exact) > rounding.relative_error()  # most rows stay rough
    assert torch.equal(*found)
