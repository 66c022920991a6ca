"""Quantised layers in a kernel's layout: moving, casting, saving, fusing, going back."""

import pytest
import torch
from torch import Tensor, nn

from pvrt import linear
from pvrt.linear import AQLMLinear, pack, pack_model
from pvrt.scheme import Scheme
from pvrt_kernels import dispatch, reference
from tests.fixtures.toy import random_layer

SCHEME = Scheme.parse("2x8g8")
warmed: list[tuple[torch.dtype, bool]] = []


def kernel(name: str = "flipped") -> dispatch.PackedKernel:
    """Keeps codes upside down, so that no layout can be mistaken for the other."""
    return dispatch.PackedKernel(
        name,
        lambda problem: problem.device_type == "cpu",
        lambda codes, books, scales, sizes: [codes.flip(0), books.clone(), scales.clone()],
        lambda packed, in_features: (packed[0].flip(0), packed[1], packed[2]),
        lambda x, packed, bias, sizes: reference.linear(
            x, packed[0].flip(0), packed[1], packed[2], bias, sizes
        ),
        warm_up=lambda packed, sizes, in_features, dtype, bias: warmed.append((dtype, bias)),
    )


@pytest.fixture(autouse=True)
def only_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_packed_kernels", {"flipped": kernel()})
    monkeypatch.setattr(dispatch, "_kernels", [])
    warmed.clear()


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
    assert layer.packed.weight.tensors[1].dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), y, rtol=0.05, atol=0.05)
    assert warmed[-1] == (torch.bfloat16, True)


def test_layers_pack_themselves_where_they_arrive_unless_they_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "packs_on_arrival", lambda device: device.type == "cpu")
    layer, trained = layer_of(16), layer_of(16)
    trained.codebooks.requires_grad_(True)
    assert layer.to("cpu").packed is not None
    assert trained.to("cpu").packed is None
    assert not linear.AQLMLinear(32, 16, SCHEME).requires_grad_(False).to("meta").packed


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
