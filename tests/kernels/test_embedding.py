"""`aqlm_embedding`: rows of a weight in the checkpoint's layout, in training."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize, aqlm_embedding
from tests.fixtures.toy import random_layer

SCHEMES = ["2x8g4", "5x8g8", "3x8g4", "1x16g8", "2x8g8o4"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_decoded_weight(scheme: str, dtype: torch.dtype) -> None:
    layer = random_layer(Scheme.parse(scheme), 52, 48, dtype=dtype)
    given = layer.codes, layer.codebooks, layer.scales
    weight = aqlm_dequantize(*given)
    ids = torch.tensor([[0, 51, 51], [17, 3, 0]])
    for rows in (ids, ids.int(), ids.T, ids[0, 1], ids[:0], torch.randint(0, 52, (200,))):
        assert torch.equal(aqlm_embedding(rows, *given), weight[rows.long()])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_a_dense_embedding(scheme: str) -> None:
    layer = random_layer(Scheme.parse(scheme), 52, 48)
    ids, factor = torch.tensor([[0, 51, 51], [17, 3, 0]]), torch.randn(2, 3, 48)
    books, scales = layer.codebooks.requires_grad_(True), layer.scales.requires_grad_(True)
    by_rows = aqlm_embedding(ids, layer.codes, books, scales)
    dense = F.embedding(ids, aqlm_dequantize(layer.codes, books, scales))
    grads = [
        torch.autograd.grad((y * factor).sin().sum(), (books, scales)) for y in (by_rows, dense)
    ]
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)
    used = grads[0][1].flatten().nonzero().flatten()
    assert set(used.tolist()) == {row // books.shape[2] for row in ids.flatten().tolist()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_another_device_rows_and_gradients_are_those_of_the_cpu(
    device: str, scheme: str
) -> None:
    layer = random_layer(Scheme.parse(scheme), 52, 48)
    ids, found = torch.tensor([[0, 51, 51], [17, 3, 0]]), []
    for where in ("cpu", device):
        books, scales = (t.to(where).requires_grad_(True) for t in (layer.codebooks, layer.scales))
        y = aqlm_embedding(ids.to(where), layer.codes.to(where), books, scales)
        assert y.device == books.device
        found.append([y, *torch.autograd.grad(y.sin().sum(), (books, scales))])
    for mine, exact in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine.cpu(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, 52])
def test_a_row_that_is_not_there_is_named(wrong: int) -> None:
    layer = random_layer(Scheme.parse("2x8g4"), 52, 48)
    given = layer.codes, layer.codebooks, layer.scales
    with pytest.raises(IndexError, match=f"there is no row {wrong}: the weight has rows 0 to 51"):
        aqlm_embedding(torch.tensor([0, wrong]), *given)
    with pytest.raises(ValueError, match="index 2 codebooks, there are 1"):
        aqlm_embedding(torch.tensor([0]), layer.codes, layer.codebooks[:1], layer.scales)


def test_it_survives_torch_compile_with_changing_batch() -> None:
    layer = random_layer(Scheme.parse("2x8g4"), 52, 48)
    books, scales = layer.codebooks.requires_grad_(True), layer.scales.requires_grad_(True)

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def run(ids: Tensor) -> Tensor:
        return aqlm_embedding(ids, layer.codes, books, scales).sin()

    for batch in (2, 3, 7):
        ids = torch.randint(0, 52, (batch, 2))
        y, expected = run(ids), aqlm_dequantize(layer.codes, books, scales)[ids].sin()
        torch.testing.assert_close(y, expected)
        ours = torch.autograd.grad(y.sum(), (books, scales))
        for mine, exact in zip(
            ours, torch.autograd.grad(expected.sum(), (books, scales)), strict=True
        ):
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)
