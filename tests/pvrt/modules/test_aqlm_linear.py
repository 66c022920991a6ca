"""Quantised layers in a kernel's layout: moving, casting, saving, fusing, going back."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pvrt.format.scheme import Scheme
from pvrt.modules import aqlm_layer, whole_model
from pvrt.modules.aqlm_layer import pack
from pvrt.modules.aqlm_linear import AQLMLinear
from pvrt.modules.whole_model import pack_model
from pvrt_kernels import reference
from pvrt_kernels.dispatch import PackedKernel, registry
from pvrt_kernels.packed import aqlm_packed_linear
from tests.fixtures.memory import LiveTensors
from tests.fixtures.toy import random_layer

SCHEME = Scheme.parse("2x8g8")
warmed: list[tuple[torch.dtype, bool]] = []


class Flipped(NamedTuple):
    codes: Tensor
    codebooks: Tensor
    scales: Tensor


def kernel(name: str = "flipped") -> PackedKernel[Flipped]:
    """Keeps codes upside down, so that no layout can be mistaken for the other."""
    return PackedKernel(
        name,
        lambda problem: problem.device_type == "cpu",
        Flipped,
        lambda codes, books, scales, sizes: Flipped(codes.flip(0), books.clone(), scales.clone()),
        lambda packed, in_features: (packed.codes.flip(0), packed.codebooks, packed.scales),
        lambda x, packed, bias, sizes: reference.linear(
            x, packed.codes.flip(0), packed.codebooks, packed.scales, bias, sizes
        ),
        warm_up=lambda packed, sizes, in_features, dtype, bias: warmed.append((dtype, bias)),
    )


@pytest.fixture(autouse=True)
def only_kernel() -> Iterator[None]:
    warmed.clear()
    with registry.using(kernel()):
        yield


pytestmark = pytest.mark.filterwarnings("ignore:no .* kernel for cpu")


def layer_of(out: int, seed: int = 0, bias: bool = True) -> AQLMLinear:
    tensors = random_layer(SCHEME, out, 32, seed=seed)
    layer = AQLMLinear(32, out, SCHEME, bias=bias).requires_grad_(False)
    layer.codes.data, layer.codebooks.data = tensors.codes, tensors.codebooks
    layer.scales.data = tensors.scales
    if layer.bias is not None:
        layer.bias.data = torch.randn(out)
    return layer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layer_of(16, 1), layer_of(8, 2), layer_of(8, 3)
        self.o_proj = layer_of(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(x)], -1)


def test_packing_and_going_back_keep_every_bit() -> None:
    layer = layer_of(16)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 32)
    y = layer(x)
    assert pack([layer], torch.float32) is not None
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert warmed == [(torch.float32, True)]
    torch.testing.assert_close(layer(x), y)
    saved = layer.state_dict()
    layer.unpack()
    for state in (saved, layer.state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(layer(x), y)


def test_casting_a_packed_layer_packs_it_anew() -> None:
    layer = layer_of(16)
    pack([layer], torch.float32)
    x = torch.randn(3, 32)
    y = layer(x)
    layer.to(torch.bfloat16)
    assert layer.packed is not None
    stored = layer.packed.weight.tensors
    assert isinstance(stored, Flipped) and stored.codebooks.dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), y, rtol=0.05, atol=0.05)
    assert warmed[-1] == (torch.bfloat16, True)


def test_layers_pack_themselves_where_they_arrive_unless_they_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aqlm_layer, "packs_on_arrival", lambda device: device.type == "cpu")
    layer, trained = layer_of(16), layer_of(16)
    trained.codebooks.requires_grad_(True)
    assert layer.to("cpu").packed is not None
    assert trained.to("cpu").packed is None
    assert not AQLMLinear(32, 16, SCHEME).requires_grad_(False).to("meta").packed


def test_siblings_share_one_weight_also_when_they_were_packed_alone() -> None:
    model = Attention()
    x = torch.randn(2, 32)
    y = model(x)
    for layer in (model.q_proj, model.o_proj):
        pack([layer], torch.float32)
    for _ in range(2):  # the second time finds everything done
        pack_model(model, torch.float32)
        assert model.q_proj.packed is model.k_proj.packed is model.v_proj.packed
        assert model.q_proj.packed is not None
        assert model.q_proj.packed.weight.partition_sizes == [16, 8, 8]
        torch.testing.assert_close(model(x), y)
    model.to(torch.float64)  # taken apart to be cast, and each packed again
    pack_model(model, torch.float64)
    assert model.q_proj.packed is model.v_proj.packed
    torch.testing.assert_close(model(x.double()).float(), y)


@pytest.mark.parametrize("other", ["scheme", "type"])
def test_siblings_that_cannot_share_a_weight_are_packed_once(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Attention()
    if other == "scheme":
        model.v_proj = AQLMLinear(32, 8, Scheme.parse("1x8g8"), bias=True)
    else:
        model.v_proj.double()
    packs: list[int] = []

    def counted(layers: list[AQLMLinear], dtype: torch.dtype) -> None:
        packs.append(len(layers))
        pack(layers, dtype)

    monkeypatch.setattr(whole_model, "pack", counted)
    for _ in range(2):
        pack_model(model, torch.float32)
        assert packs == [1, 1, 1, 1]


@pytest.fixture(params=["inference_mode", "no_grad", "enable_grad"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """What is asked about shared outputs is asked of tensors with and without a version."""
    with getattr(torch, request.param)():
        yield request.param


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product with a packed weight from here on."""
    rows: list[int] = []

    def product(x: Tensor, *arguments: Any) -> Tensor:
        rows.append(len(x))
        return aqlm_packed_linear(x, *arguments)

    monkeypatch.setattr(aqlm_layer, "aqlm_packed_linear", product)
    return rows


def siblings() -> tuple[list[AQLMLinear], list[nn.Linear]]:
    """Packed q, k and v, and the dense layers that they stand for."""
    layers = [layer_of(16, 1), layer_of(8, 2), layer_of(8, 3)]
    dense = [layer.to_dense() for layer in layers]
    pack(layers, torch.float32)
    return layers, dense


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_siblings_of_one_input_are_computed_once_in_any_order(
    mode: str, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, dense = siblings()
    products = counted(monkeypatch)
    x = torch.randn(3, 32)
    for index in order:
        torch.testing.assert_close(layers[index](x), dense[index](x))
    assert products == [3]


def test_an_input_that_was_written_to_is_computed_again(mode: str) -> None:
    layers, dense = siblings()
    x = torch.randn(3, 32)
    layers[0](x)
    for index in (1, 2, 0, 0):
        x.copy_(torch.randn(3, 32))
        torch.testing.assert_close(layers[index](x), dense[index](x))


def test_a_layer_that_is_asked_twice_gives_no_output_twice(mode: str) -> None:
    layers, dense = siblings()
    x = torch.randn(3, 32)
    layers[0](x).zero_()  # what was handed out is the caller's
    torch.testing.assert_close(layers[0](x), dense[0](x))


def test_a_buffer_of_before_inference_mode_is_computed_again_too() -> None:
    layers, dense = siblings()
    x = torch.randn(3, 32)
    with torch.inference_mode():
        layers[0](x)
        x.mul_(2)
        torch.testing.assert_close(layers[1](x), dense[1](x))


@pytest.mark.parametrize("called", [(0,), (2, 1, 0), (0, 2)])
def test_neither_input_nor_outputs_outlive_their_use(mode: str, called: tuple[int, ...]) -> None:
    layers, _ = siblings()
    gc.collect()
    with LiveTensors() as live:
        x = torch.randn(1024, 32)
        for index in called:
            layers[index](x)
        alive = weakref.ref(x)
        if len(called) == 3:
            assert live.bytes == x.nbytes  # all have come: the outputs are gone before the input
        del x
        assert alive() is None
        assert live.bytes == 0


def test_siblings_are_compiled_in_one_graph_and_computed_once() -> None:
    model = Attention()
    pack_model(model, torch.float32)
    products: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        products.extend(node for node in graph.graph.nodes if "aqlm_packed" in str(node.target))
        return graph.forward

    x = torch.randn(2, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(products) == 2  # q, k and v in one; o
