"""Errors of the C library's products are within the bounds that `rounding` states."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt_kernels.cpu import library as cpu
from pvrt_kernels.cpu import rounding
from pvrt_kernels.packed import aqlm_packed_linear
from tests.fixtures.instruction_sets import relative
from tests.fixtures.packed_layers import exact, fused, packed
from tests.fixtures.turning import turning


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


def tiny(layer: QuantizedLayer, x: Tensor) -> None:
    x.mul_(10.0 ** -torch.arange(30, 30 + len(x))[:, None])  # the last of them underflow


def huge(layer: QuantizedLayer, x: Tensor) -> None:
    x.mul_(1e34)


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
        [ordinary, outlier, cancelling, far_books, tiny, huge],
        ["2x8g8", "1x7g4", "17x8g8"],
        cpu.INSTRUCTION_SETS,
    ),
    indirect=["isa"],
)
def test_no_output_is_farther_off_than_the_stated_bound(
    isa: str, data: Callable[[QuantizedLayer, Tensor], None], scheme: str
) -> None:
    assert share_of_bound(data, scheme) <= 1


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_what_is_beyond_all_numbers_is_that_on_every_instruction_set(
    isa: str, value: float
) -> None:
    """One input of two tokens is; results of the other one, and of other layers, are numbers."""
    sizes = [64, 40, 130]
    layer, x = fused("1x8g8", sizes, 208, torch.float32), torch.randn(2, 208)
    layer.codebooks.mul_(1e6)  # so that 3e38 overflows
    weight, right = packed(layer, sizes), exact(layer, sizes)
    x[1, 77] = value
    for tokens in (x, x[1:], x[1:].repeat(3, 1)):
        y, expected = aqlm_packed_linear(tokens, weight), (tokens.double() @ right.T).float()
        whole = expected.isfinite()
        assert torch.equal(y[~whole].nan_to_num(), expected[~whole].nan_to_num())
        assert relative(y[whole], expected[whole]) < rounding.relative_error()


@pytest.mark.parametrize("scheme", ["2x8g8", "1x7g4"])
def test_the_stated_bound_is_near_what_happens(isa: str, scheme: str) -> None:
    """Where one input makes most of the sums, errors have no chance to cancel."""
    assert share_of_bound(outlier, scheme) > 0.03
    assert cpu.table_rounding() == 0 or share_of_bound(ordinary, scheme) > 0.03
