"""Single rows of packed weights, and the decoder program that embeds and ends with them."""

import pytest
import torch
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.scheme import Scheme
from pvrt_kernels import reference
from pvrt_kernels.cpu import library as cpu
from pvrt_kernels.cpu import rounding
from pvrt_kernels.cpu.decoder_program import Program, Rounded, Step
from pvrt_kernels.packed import PackedWeight, aqlm_pack, aqlm_packed_rows
from tests.fixtures.instruction_sets import relative
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


def one_layer(weight: PackedWeight | Tensor, hidden: Tensor, logits: Tensor) -> Program:
    """A model of nothing but a tied embedding and head with a norm between them."""
    program = Program()
    program.embed(weight, hidden, scale=3.0)
    norm = torch.linspace(0.5, 1.5, hidden.shape[1])
    scores = Rounded(weight) if isinstance(weight, Tensor) else None
    program.logits(hidden, logits, weight, norm, 1e-5, scores)
    return program


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_program_embeds_and_ends_with_one_packed_weight(
    isa: str, scheme: str, threads: int
) -> None:
    layer = random_layer(Scheme.parse(scheme), 203, 9 * 16, dtype=torch.bfloat16)
    weight, exact = packed(layer), dense(layer, torch.float32)
    rows, before = 11, torch.get_num_threads()
    hidden, logits = torch.empty(rows, 144), torch.empty(rows, 203)
    program, cache = one_layer(weight, hidden, logits), torch.empty(1, 2, 1, 1, 1)
    try:
        torch.set_num_threads(threads)
        for count in (1, 2, 3, 11):
            tokens = [202, 0, 63, 64, 202, *range(6)][:count]
            for argmax_only in (False, True):
                hidden.fill_(torch.nan), logits.fill_(torch.nan)
                program.run([Step(token, 0, cache) for token in tokens], argmax_only)
                assert torch.equal(hidden[:count], 3 * exact[tokens])
                x = hidden[:count].double()
                x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
                expected = x * torch.linspace(0.5, 1.5, 144).double() @ exact.double().T
                error = relative(logits[:count], expected)
                assert error < rounding.relative_error() + 2 * rounding.FP32_RELATIVE
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
