import pytest
import torch

from pvrt.scheme import Scheme


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
    ("scheme", "bits"),
    # Averages over all linears of Llama-2-7B, as the papers quote them (AQLM table 1, PV table 2).
    [("2x8g8", 2.01), ("1x16g8", 2.29), ("1x15g8", 2.02), ("1x16g16", 1.58), ("2x12g8", 3.04)],
)
def test_bits_of_llama_2_7b_are_the_published_ones(scheme: str, bits: float) -> None:
    form = Scheme.parse(scheme)
    shapes = 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]
    total = sum(form.layer_bits(*shape) for shape in shapes)
    assert round(total / sum(out * inp for out, inp in shapes), 2) == bits
