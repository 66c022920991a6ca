import pytest
import torch

from pvrt.format.scheme import GridScheme, Scheme, parse_scheme


def test_a_scheme_survives_its_text() -> None:
    for text in ("2x8g8", "1x16g16", "2x12g8", "2x8g8o4"):
        assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize("text", ["", "2x8", "2bits", "0x8g8", "2x17g8", "2x8g0", "2x8g8 o"])
def test_impossible_schemes_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Scheme.parse(text)


def test_codes_of_more_than_eight_bits_take_two_bytes() -> None:
    assert Scheme.parse("2x8g8").code_dtype is torch.int8
    assert Scheme.parse("1x9g8").code_dtype is torch.int16


@pytest.mark.parametrize(
    ("scheme", "bits"), [("2x8g8", 2), ("1x16g16", 1), ("3x8g8", 3), ("1x4g8", 0.5), ("2x8g8o2", 1)]
)
def test_codes_alone_have_whole_bits(scheme: str, bits: float) -> None:
    assert Scheme.parse(scheme).code_bits == bits


@pytest.mark.parametrize(
    ("scheme", "bits"),
    # Averages over all linears of Llama-2-7B, as the papers quote them (AQLM table 1, PV table 2).
    [("2x8g8", 2.01), ("1x16g8", 2.29), ("1x15g8", 2.02), ("1x16g16", 1.58), ("2x12g8", 3.04)],
)
def test_bits_of_llama_2_7b_are_the_published_ones(scheme: str, bits: float) -> None:
    form = Scheme.parse(scheme)
    shapes = 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]
    total = sum(form.layer_bits(*shape) for shape in shapes)
    assert round(total / sum(out * inp for out, inp in shapes), 2) == bits


@pytest.mark.parametrize("text", ["w4g128", "w2g64s", "w3g32", "w8g64"])
def test_a_grid_survives_its_text(text: str) -> None:
    scheme = parse_scheme(text)
    assert isinstance(scheme, GridScheme)
    assert str(scheme) == text


def test_one_text_tells_the_two_kinds_of_scheme_apart() -> None:
    assert parse_scheme("2x8g8") == Scheme(2, 8, 8)
    assert parse_scheme(" w4g128s ") == GridScheme(4, 128, symmetric=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4", "write codebooks x bits g group .2x8g8., or for a scalar grid w bits g group"),
        ("4g128", "is not a scheme"),
        ("w1g64", "bits must be an integer from 2 to 8, got 1"),
        ("w4g4", "group_size must be an integer from 8 to 4096, got 4"),
        ("2x17g8", "nbits_per_codebook must be an integer from 1 to 16, got 17"),
    ],
)
def test_a_scheme_that_is_none_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_scheme(text)


def test_bits_of_a_grid_count_scales_and_zeros() -> None:
    assert parse_scheme("w4g128").bits_per_weight(4096, 4096) == 4 + 20 / 128
    assert parse_scheme("w2g64s").bits_per_weight(4096, 4096) == 2 + 16 / 64
