"""AQLM experts in vLLM without an engine: loading, splitting over ranks, refusing."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("vllm")

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.config_block import LayerSchemes
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.context import Context, DecodingNotice
from pvrt.vllm_plugin.experts import AQLMExpertsMethod
from pvrt.vllm_plugin.layers import Layers
from pvrt_kernels import aqlm_dequantize
from pvrt_kernels.cpu import rounding
from tests.fixtures.instruction_sets import relative
from tests.fixtures.toy import random_layer

HIDDEN, WIDTH, EXPERTS = 64, 96, 4
PREFIX = "model.layers.0.block_sparse_moe.experts"
NAMES = {"w1": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "w3": (WIDTH, HIDDEN)}


class Experts(nn.Module):
    """What AQLMExpertsMethod asks of vLLM's RoutedExperts, which only an engine can build."""

    def __init__(self, rank: int = 0, ranks: int = 1, owned: list[int] | None = None) -> None:
        super().__init__()
        self.layer_name, self.params_dtype = PREFIX, torch.float32
        self.ckpt_gate_proj_name = "w1"
        self.ckpt_down_proj_name = "w2"
        self.ckpt_up_proj_name = "w3"
        self.activation = SimpleNamespace(value="silu")
        parallel = SimpleNamespace(tp_size=ranks, tp_rank=rank)
        self.moe_config = SimpleNamespace(has_bias=False, moe_parallel_config=parallel)
        self.global_num_experts = EXPERTS
        self.owned = list(range(EXPERTS)) if owned is None else owned
        self.expert_map = None
        if owned is not None:
            self.expert_map = torch.tensor([self.local(expert) for expert in range(EXPERTS)])
        self.apply_router_weight_on_input = False

    def local(self, expert: int) -> int:
        return self.owned.index(expert) if expert in self.owned else -1

    _map_global_expert_id_to_local_expert_id = local


def made(layer: Any, scheme: str = "2x8g8") -> tuple[AQLMExpertsMethod, Any]:
    return with_schemes(layer, LayerSchemes(Scheme.parse(scheme)))


def with_schemes(layer: Any, schemes: LayerSchemes) -> tuple[AQLMExpertsMethod, Any]:
    context = Context(Layers(schemes, []), {}, DecodingNotice())
    method = AQLMExpertsMethod(context, layer.moe_config)
    width = WIDTH // layer.moe_config.moe_parallel_config.tp_size
    method.create_weights(layer, len(layer.owned), HIDDEN, width, torch.float32)
    return method, layer


def sources(scheme: str = "2x8g8", down: str = "") -> dict[str, QuantizedLayer]:
    """`down` is the scheme of w2, where it is another."""
    forms = {name: Scheme.parse((name == "w2" and down) or scheme) for name in NAMES}
    return {
        f"{expert}.{name}": random_layer(forms[name], *shape, seed=10 * expert + number)
        for expert in range(EXPERTS)
        for number, (name, shape) in enumerate(NAMES.items())
    }


def tensors(given: dict[str, QuantizedLayer]) -> dict[str, Tensor]:
    return {key: tensor for name, layer in given.items() for key, tensor in layer.named(name)}


def mixture(given: dict[str, QuantizedLayer], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    dense = {
        name: aqlm_dequantize(layer.codes, layer.codebooks, layer.scales)
        for name, layer in given.items()
    }
    y = torch.zeros(x.shape[0], HIDDEN)
    for row in range(x.shape[0]):
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            inner = F.silu(dense[f"{expert}.w1"] @ x[row]) * (dense[f"{expert}.w3"] @ x[row])
            y[row] += weight * (dense[f"{expert}.w2"] @ inner)
    return y


def routing(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(tokens)])
    return x, torch.rand(tokens, 2, generator=generator), ids.int()


def tolerance() -> float:
    """Errors of three products add up: gate, of which silu makes a tenth more, up, and down."""
    return 3.1 * rounding.relative_error()


@pytest.mark.parametrize("scheme", ["2x8g8", "1x12g8", "2x8g8o4"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_add_up_to_the_mixture(isa: str, scheme: str, ranks: int) -> None:
    given, (x, weights, ids) = sources(scheme), routing()
    total = torch.zeros(x.shape[0], HIDDEN)
    for rank in range(ranks):
        method, layer = made(Experts(rank, ranks), scheme)
        loaded = set(layer.load_weights(tensors(given).items()))
        assert loaded == {name for name, _ in layer.named_parameters()}
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, weights, ids)
    assert relative(total, mixture(given, x, ids, weights)) < tolerance()


def named(schemes: dict[str, str], others: dict[str, str] | None = None) -> LayerSchemes:
    """Schemes of all experts' w1, w2 and w3, and of `others` by expert and name."""
    every = {f"{n}.{name}": scheme for n in range(EXPERTS) for name, scheme in schemes.items()}
    every |= others or {}
    return LayerSchemes(None, {f"{PREFIX}.{n}": Scheme.parse(text) for n, text in every.items()})


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_down_projections_may_have_a_scheme_of_their_own(isa: str, ranks: int) -> None:
    given, (x, weights, ids) = sources("2x8g8", "3x8g4"), routing()
    schemes = named({"w1": "2x8g8", "w2": "3x8g4", "w3": "2x8g8"})
    total = torch.zeros(x.shape[0], HIDDEN)
    for rank in range(ranks):
        method, layer = with_schemes(Experts(rank, ranks), schemes)
        list(layer.load_weights(tensors(given).items()))
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, weights, ids)
    assert relative(total, mixture(given, x, ids, weights)) < tolerance()


@pytest.mark.parametrize(
    ("schemes", "others", "sentence"),
    [
        (
            {"w1": "2x8g8", "w2": "2x8g8", "w3": "4x8g8"},
            {},
            r"experts: all experts' w1 and w3 need one scheme in vLLM, not .*w1 2x8g8, .*w3 4x8g8;",
        ),
        (
            {"w1": "2x8g8", "w2": "2x8g8", "w3": "2x8g8"},
            {"2.w2": "3x8g8"},
            r"experts: all experts' w2 need one scheme in vLLM, not .*w2 2x8g8, .*2.w2 3x8g8;",
        ),
    ],
)
def test_experts_of_unequal_schemes_are_refused_by_name(
    schemes: dict[str, str], others: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ServeError, match=sentence):
        with_schemes(Experts(), named(schemes, others))


def test_an_expert_without_a_scheme_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=rf"does not say what {PREFIX}.0.w3 is: list it"):
        with_schemes(Experts(), named({"w1": "2x8g8", "w2": "2x8g8"}))


def test_ranks_of_expert_parallelism_add_up_too(isa: str) -> None:
    given, (x, weights, ids) = sources(), routing()
    total = torch.zeros(x.shape[0], HIDDEN)
    for owned in ([0, 2], [1, 3]):
        method, layer = made(Experts(owned=owned))
        list(layer.load_weights(tensors(given).items()))
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, weights, ids)
    assert relative(total, mixture(given, x, ids, weights)) < tolerance()


@pytest.mark.parametrize("places", [{"ranks": 2}, {"owned": [[0, 2], [1, 3]]}])
def test_experts_of_gpt_oss_have_biases_and_an_activation_of_their_own(
    isa: str, places: dict[str, Any]
) -> None:
    """The definition is transformers'; ranks add the bias of the down projection once."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    given, (x, weights, ids) = sources(), routing()
    generator = torch.Generator().manual_seed(5)
    biases = {name: torch.randn(given[name].codes.shape[0], generator=generator) for name in given}
    stored = {**tensors(given), **{f"{name}.bias": bias for name, bias in biases.items()}}
    fused = GptOssExperts(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    )
    with torch.no_grad():
        for expert in range(EXPERTS):
            w1, w2, w3 = (
                aqlm_dequantize(own.codes, own.codebooks, own.scales)
                for own in (given[f"{expert}.{name}"] for name in NAMES)
            )
            fused.gate_up_proj[expert, :, ::2], fused.gate_up_proj[expert, :, 1::2] = w1.T, w3.T
            fused.gate_up_proj_bias[expert, ::2] = biases[f"{expert}.w1"]
            fused.gate_up_proj_bias[expert, 1::2] = biases[f"{expert}.w3"]
            fused.down_proj[expert], fused.down_proj_bias[expert] = w2.T, biases[f"{expert}.w2"]
        expected = GptOssExperts.forward(fused, x, ids.long(), weights)
    total = torch.zeros_like(x)
    for number in range(2):
        own: dict[str, Any] = {"rank": number, "ranks": 2} if "ranks" in places else {}
        if "owned" in places:
            own = {"owned": places["owned"][number]}
        layer = Experts(**own)
        layer.activation, layer.moe_config.has_bias = SimpleNamespace(value="swigluoai"), True
        method, layer = made(layer)
        assert {n for n, _ in layer.named_parameters()} == set(layer.load_weights(stored.items()))
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x, weights, ids)
    assert relative(total, expected) < tolerance()


def test_a_weight_on_the_input_is_no_weight_on_the_output(isa: str) -> None:
    given, (x, weights, ids) = sources(), routing()
    method, layer = made(Experts())
    list(layer.load_weights(tensors(given).items()))
    method.process_weights_after_loading(layer)
    layer.apply_router_weight_on_input = True
    ones = torch.ones(5, 1)
    expected = mixture(given, x * weights[:, :1], ids[:, :1], ones)
    assert relative(method.apply(layer, x, weights[:, :1], ids[:, :1]), expected) < tolerance()


def test_vllms_own_way_of_calling_loaders_works_too() -> None:
    method, layer = made(Experts())
    for name, tensor in tensors(sources()).items():
        expert, shard, part = name.split(".")
        parameter = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{part}")
        arguments = dict(weight_name=name, shard_id=shard, expert_id=int(expert))
        assert parameter.weight_loader(parameter, tensor, **arguments, return_success=True)
    method.process_weights_after_loading(layer)


@pytest.mark.parametrize("name", ["2.w1.codes", "0.w2.scales", "3.w3.codebooks"])
def test_a_missing_tensor_is_refused_by_its_name(name: str) -> None:
    method, layer = made(Experts())
    list(layer.load_weights((n, t) for n, t in tensors(sources()).items() if n != name))
    with pytest.raises(CheckpointError, match=f"lacks {PREFIX}.{name}, needed"):
        method.process_weights_after_loading(layer)


def test_a_dense_expert_is_refused_by_its_name() -> None:
    _, layer = made(Experts())
    with pytest.raises(CheckpointError, match=f"dense weight for {PREFIX}.1.w2, .*not_to_quant"):
        list(layer.load_weights([("1.w2.weight", torch.zeros(HIDDEN, WIDTH))]))


def test_a_wrong_shape_is_refused_with_both_shapes() -> None:
    _, layer = made(Experts())
    codes = sources()["0.w1"].codes
    with pytest.raises(CheckpointError, match=r"0.w2.codes has shape \[96, 8, 2\].*\[64, 12, 2\]"):
        list(layer.load_weights([("0.w2.codes", codes)]))


def test_experts_that_cannot_be_run_are_refused() -> None:
    layer = Experts()
    layer.activation = SimpleNamespace(value="swiglustep")
    with pytest.raises(ServeError, match=r"silu, gelu, gelu_tanh, .*, and not with swiglustep"):
        made(layer)
    with pytest.raises(ServeError, match=r"leaves to each rank; try a smaller"):
        made(Experts(ranks=8))
    with pytest.raises(CheckpointError, match=r"groups of 1x8g128 do not divide its experts of 96"):
        made(Experts(), "1x8g128")


def test_decoding_for_want_of_a_kernel_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's loggers may or may not pass messages on to the root, where caplog listens.
    monkeypatch.setattr(logging.getLogger("vllm.pvrt"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("vllm.pvrt"), "propagate", False)
    method, layer = made(Experts(), "2x8g8o4")
    list(layer.load_weights(tensors(sources("2x8g8o4")).items()))
    method.process_weights_after_loading(layer)
    (message,) = caplog.messages
    assert f"{PREFIX} takes {EXPERTS * 2 * WIDTH * HIDDEN * 4} bytes instead of" in message
