"""The ops against a float64 loop that is written from the definition alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.scheme import Scheme
from pvrt_kernels import aqlm_dequantize, aqlm_linear, has_fast_kernel
from pvrt_kernels.dispatch import REFERENCE, Kernel, Problem, registry
from pvrt_kernels.ops import _dequantize_op, _linear_op
from tests.fixtures.toy import random_layer

PROBLEM = Problem("cpu", torch.float32, 2, 256, 1, 8, tokens=1)

SCHEMES = ["2x8g8", "1x16g8", "1x16g16", "1x8g8", "1x8g4", "4x8g16", "2x12g8", "1x15g8", "2x8g8o4"]
pytestmark = pytest.mark.filterwarnings("ignore:no .* kernel for cpu")


def by_definition(layer: QuantizedLayer) -> Tensor:
    """Decode weight by weight in float64; a stored code v means v mod 2^B."""
    books, size = layer.codebooks.double(), layer.codebooks.shape[1]
    rows, groups, count = layer.codes.shape
    _, _, out_group, g = books.shape
    weight = torch.full((rows * out_group, groups * g), float("nan"), dtype=torch.float64)
    for r in range(rows):
        for j in range(groups):
            block = sum(books[m, int(layer.codes[r, j, m]) % size] for m in range(count))
            where = slice(r * out_group, (r + 1) * out_group), slice(j * g, (j + 1) * g)
            weight[where] = block * layer.scales[r].double().item()
    return weight


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_follows_the_definition(scheme: str) -> None:
    layer = random_layer(Scheme.parse(scheme), 12, 48, seed=3)
    decoded = aqlm_dequantize(layer.codes, layer.codebooks, layer.scales)
    torch.testing.assert_close(decoded.double(), by_definition(layer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_are_rounded_once(dtype: torch.dtype) -> None:
    layer = random_layer(Scheme.parse("4x8g8"), 8, 32, dtype=dtype)
    decoded = aqlm_dequantize(layer.codes, layer.codebooks, layer.scales)
    exact = by_definition(layer).float().to(dtype)
    # float32 sums may fall on the other side of a rounding border, by one unit in the last place
    torch.testing.assert_close(decoded, exact, rtol=torch.finfo(dtype).eps, atol=0)
    assert (decoded == exact).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("scheme", ["2x8g8", "1x16g8", "2x8g8o4"])
def test_linear_multiplies_by_the_decoded_weight(scheme: str, shape: tuple[int, ...]) -> None:
    layer = random_layer(Scheme.parse(scheme), 12, 48, bias=torch.randn(12))
    x = torch.randn(*shape, 48)
    y = aqlm_linear(x, *layer_args(layer))
    assert layer.bias is not None
    expected = x.double() @ by_definition(layer).T + layer.bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_results_may_be_added_to_in_place(shape: tuple[int, ...]) -> None:
    """As some blocks do with a layer's output, in training too."""
    layer = random_layer(Scheme.parse("2x8g8"), 12, 48)
    codes, books, scales, _ = layer_args(layer)
    books.requires_grad_(True)
    x = torch.randn(*shape, 48, requires_grad=True)
    y = aqlm_linear(x, codes, books, scales)
    y += 1
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and books.grad is not None


def layer_args(layer: QuantizedLayer) -> tuple[Any, ...]:
    return layer.codes, layer.codebooks, layer.scales, layer.bias


def test_fused_partitions_use_their_own_codebooks() -> None:
    scheme = Scheme.parse("2x8g8")
    parts = [random_layer(scheme, out, 32, seed=out) for out in (16, 8, 24)]
    fused = QuantizedLayer(
        torch.cat([part.codes for part in parts]),
        torch.stack([part.codebooks for part in parts]),
        torch.cat([part.scales for part in parts]),
    )
    x = torch.randn(3, 32)
    y = aqlm_linear(x, fused.codes, fused.codebooks, fused.scales, None, [16, 8, 24])
    expected = torch.cat([x @ by_definition(part).float().T for part in parts], -1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("scheme", ["2x8g8", "1x8g4", "2x8g8o4"])
def test_gradients_equal_those_of_a_differentiable_loop(scheme: str) -> None:
    layer = random_layer(Scheme.parse(scheme), 8, 16)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    leaves = [x, layer.codebooks.double(), layer.scales.double(), torch.randn(8).double()]
    inputs = [leaf.requires_grad_(True) for leaf in leaves]
    reference = torch.autograd.grad(loss_by_loop(layer.codes, *inputs), inputs)
    singles = [leaf.detach().float().requires_grad_(True) for leaf in leaves]
    sx, books, scales, bias = singles
    y = aqlm_linear(sx, layer.codes, books, scales, bias)
    ours = torch.autograd.grad(y.sin().sum(), singles)
    for mine, exact in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)


def loss_by_loop(codes: Tensor, x: Tensor, books: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """The same loss through torch's own autograd, gather by gather."""
    count, size, _, g = books.shape
    blocks = sum(books[m][codes[..., m].long() % size] for m in range(count))
    assert isinstance(blocks, Tensor)
    blocks = blocks * scales.reshape(-1, 1, 1, 1)
    weight = blocks.transpose(1, 2).reshape(-1, codes.shape[1] * g)
    return (x @ weight.T + bias).sin().sum()


def test_dequantize_gradients_equal_those_of_the_linear_op() -> None:
    layer = random_layer(Scheme.parse("2x8g8"), 8, 16)
    x = torch.randn(5, 16)
    grads = []
    for through_linear in (True, False):
        books = layer.codebooks.clone().requires_grad_(True)
        scales = layer.scales.clone().requires_grad_(True)
        if through_linear:
            y = aqlm_linear(x, layer.codes, books, scales)
        else:
            y = x @ aqlm_dequantize(layer.codes, books, scales).T
        grads.append(torch.autograd.grad(y.square().sum(), (books, scales)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scheme", "bias"), [("2x8g8", True), ("1x16g8", False)])
def test_opcheck_accepts_both_ops(scheme: str, bias: bool) -> None:
    layer = random_layer(Scheme.parse(scheme), 16, 32)
    books = layer.codebooks.unsqueeze(0).requires_grad_(True)
    scales = layer.scales.requires_grad_(True)
    x = torch.randn(4, 32, requires_grad=True)
    extra = torch.randn(16, requires_grad=True) if bias else None
    torch.library.opcheck(_linear_op, (x, layer.codes, books, scales, extra, [16]))
    torch.library.opcheck(_dequantize_op, (layer.codes, books, scales, [16]))


def test_the_op_survives_torch_compile_with_changing_batch() -> None:
    layer = random_layer(Scheme.parse("2x8g8"), 16, 32)

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return aqlm_linear(x, layer.codes, layer.codebooks, layer.scales) + 1

    for batch in (1, 3, 7):
        x = torch.randn(batch, 32)
        torch.testing.assert_close(run(x), x @ by_definition(layer).float().T + 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(1, 40)}, "x has 40 features, the weight takes 32"),
        ({"scales": torch.zeros(3, 1, 1, 1)}, "scales 3"),
        ({"codes": torch.zeros(16, 4, 3, dtype=torch.int8)}, "codes index 3 codebooks"),
        ({"codes": torch.zeros(16, 4, dtype=torch.int8)}, "codes must be 3-D"),
    ],
)
def test_wrong_shapes_are_refused_in_words(change: dict[str, Tensor], sentence: str) -> None:
    layer = random_layer(Scheme.parse("2x8g8"), 16, 32)
    given: dict[str, Any] = {
        "x": torch.zeros(1, 32),
        "codes": layer.codes,
        "codebooks": layer.codebooks,
        "scales": layer.scales,
        **change,
    }
    with pytest.raises(ValueError, match=sentence):
        aqlm_linear(**given)


def test_the_registry_prefers_an_added_kernel() -> None:
    layer = random_layer(Scheme.parse("2x8g8o4"), 16, 32)  # a scheme that no other kernel takes

    def marker(x: Tensor, *rest: Any) -> Tensor:
        return torch.full((*x.shape[:-1], 16), 7.0)

    one_token = Kernel("marker", lambda p: p.device_type == "cpu" and p.tokens == 1, marker)
    with registry.using(one_token):
        assert has_fast_kernel("cpu", 2, 8, 8, 4)
        y = aqlm_linear(torch.zeros(1, 32), layer.codes, layer.codebooks, layer.scales)
        assert bool((y == 7).all())
        y = aqlm_linear(torch.zeros(2, 32), layer.codes, layer.codebooks, layer.scales)
        assert bool((y == 0).all())
        with pytest.raises(ValueError, match="already registered"):
            registry.add(Kernel("marker", lambda p: True, marker))
    assert not has_fast_kernel("cpu", 2, 8, 8, 4)


def test_after_using_other_kernels_all_is_as_before() -> None:
    before = registry.select(PROBLEM), registry.select_packed(PROBLEM)
    with pytest.raises(RuntimeError, match="inside"), registry.using():
        assert registry.select(PROBLEM) is REFERENCE
        assert registry.select_packed(PROBLEM) is None
        registry.add(Kernel("marker", lambda p: True, REFERENCE.linear))
        raise RuntimeError("inside")
    assert (registry.select(PROBLEM), registry.select_packed(PROBLEM)) == before
    with pytest.raises(KeyError):
        registry.packed("marker")


@pytest.mark.filterwarnings("always:no .* kernel for cpu")
def test_falling_back_for_few_tokens_warns_once_and_names_the_cost() -> None:
    layer = random_layer(Scheme.parse("3x7g8o2"), 16, 32)
    arguments = (layer.codes, layer.codebooks, layer.scales)
    with pytest.warns(UserWarning, match="no 3x7g8 kernel for cpu.*many times slower"):
        aqlm_linear(torch.zeros(1, 32), *arguments)
    with pytest.warns(UserWarning) as caught:
        aqlm_linear(torch.zeros(1, 32), *arguments)
        aqlm_linear(torch.zeros(500, 32), *arguments)
        import warnings

        warnings.warn("the only one", UserWarning, stacklevel=1)
    assert len(caught) == 1
