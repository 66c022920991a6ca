"""Which scheme each of vLLM's linear layers gets, and what layers of several schemes compute."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("vllm")

from vllm import config as vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import vocab_parallel_embedding as vllm_embedding

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.config_block import quantization_config
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.embedding import AQLMEmbeddingMethod
from pvrt.vllm_plugin.linear import AQLMLinearMethod
from pvrt.vllm_plugin.plugin import AQLMConfig, register
from pvrt_kernels import aqlm_dequantize
from pvrt_kernels.cpu import rounding
from pvrt_kernels.dispatch import registry
from tests.fixtures.instruction_sets import relative
from tests.fixtures.toy import VOCABULARY, random_layer, toy_model, write_toy

HIDDEN, INNER, HEAD, HEADS, KV_HEADS = 128, 256, 16, 8, 2
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
QKV = {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD}
FUSED = {"qkv_proj": [*QKV], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with vllm_config.set_current_vllm_config(vllm_config.VllmConfig()):
        yield


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tensor parallelism without processes: be(rank, size)."""

    def be(rank: int, size: int) -> None:
        for module in (vllm_parameter, vllm_linear, vllm_embedding):
            for name, value in (("rank", rank), ("world_size", size)):
                get = f"get_tensor_model_parallel_{name}"
                monkeypatch.setattr(module, get, lambda value=value: value)

    be(0, 1)
    return be


def config(schemes: dict[str, str], dense: tuple[str, ...] = ()) -> AQLMConfig:
    named = {name: Scheme.parse(text) for name, text in schemes.items()}
    block = quantization_config(named, dense, {"model.embed_tokens": Scheme.parse("2x8g4")})
    block["schemes"]["2x8g4"].remove("model.embed_tokens")
    made = AQLMConfig.from_config(block)
    made.packed_modules_mapping = dict(FUSED)
    return made


def qkv(made: AQLMConfig, prefix: str = "") -> Any:
    types = {"quant_config": made, "params_dtype": torch.float32}
    name = f"{prefix}{ATTENTION}.qkv_proj"
    sizes = HIDDEN, HEAD, HEADS, KV_HEADS
    return vllm_linear.QKVParallelLinear(*sizes, bias=True, prefix=name, **types)


def gate_up(made: AQLMConfig) -> Any:
    types = {"quant_config": made, "params_dtype": torch.float32}
    name = f"{MLP}.gate_up_proj"
    make = vllm_linear.MergedColumnParallelLinear
    return make(HIDDEN, [INNER, INNER], bias=False, prefix=name, **types)


def source(scheme: str, out: int, seed: int = 0) -> QuantizedLayer:
    bias = torch.randn(out, generator=torch.Generator().manual_seed(seed))
    return random_layer(Scheme.parse(scheme), out, HIDDEN, seed=seed, bias=bias)


def load(layer: Any, tensors: QuantizedLayer, shard: Any, skip: str = "") -> None:
    for name, tensor in tensors.named("layer"):
        part = name.removeprefix("layer.")
        if part != skip and getattr(layer, part, None) is not None:
            parameter = getattr(layer, part)
            parameter.weight_loader(parameter, tensor, shard)


def dense(tensors: QuantizedLayer, x: Tensor, bias: bool) -> Tensor:
    weight = aqlm_dequantize(tensors.codes, tensors.codebooks, tensors.scales)
    return F.linear(x, weight, tensors.bias if bias else None)


def run(layer: Any, x: Tensor) -> Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    output: Tensor = layer.quant_method.apply(layer, x, layer.bias)
    return output


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=["kernels", "no kernels"])
def tolerance(request: pytest.FixtureRequest) -> Iterator[float]:
    if request.param == "kernels":
        yield rounding.relative_error()
    else:
        with registry.using():
            yield 1e-5


# ---- layers of several schemes


@pytest.mark.parametrize(
    "schemes",
    [
        ("2x8g8", "2x8g8", "4x8g8"),
        ("2x8g8", "4x8g8", "2x8g8"),
        ("2x8g4", "3x8g8", "1x8g16"),
        ("2x8g8o2", "1x12g8", "1x12g8"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_of_several_schemes_computes_what_its_source_layers_do(
    schemes: tuple[str, ...], size: int, be: Any, x: Tensor, tolerance: float
) -> None:
    named = dict(zip(QKV, schemes, strict=True))
    given = {name: source(named[name], out, seed) for seed, (name, out) in enumerate(QKV.items())}
    whole = {name: dense(tensors, x, bias=True) for name, tensors in given.items()}
    for rank in range(size):
        be(rank, size)
        layer = qkv(config({f"{ATTENTION}.{name}": text for name, text in named.items()}))
        for name, tensors in reversed(given.items()):  # in any order
            load(layer, tensors, name[0])
        parts = [whole["q_proj"].chunk(size, -1)[rank]]
        copies = max(1, size // KV_HEADS)  # with 4 ranks, two of them hold the same head
        parts += [whole[n].chunk(size // copies, -1)[rank // copies] for n in ("k_proj", "v_proj")]
        assert relative(run(layer, x), torch.cat(parts, -1)) < tolerance


@pytest.mark.parametrize("size", [1, 2])
def test_gate_and_up_of_two_schemes_compute_what_they_do(
    size: int, be: Any, x: Tensor, tolerance: float
) -> None:
    schemes = {"gate_proj": "2x8g8", "up_proj": "3x8g4"}
    given = [source(text, INNER, seed) for seed, text in enumerate(schemes.values())]
    for rank in range(size):
        be(rank, size)
        layer = gate_up(config({f"{MLP}.{name}": text for name, text in schemes.items()}))
        for shard, tensors in enumerate(given):
            load(layer, tensors, shard)
        parts = [dense(tensors, x, bias=False).chunk(size, -1)[rank] for tensors in given]
        assert relative(run(layer, x), torch.cat(parts, -1)) < tolerance


def test_neighbours_of_one_scheme_are_one_weight(be: Any) -> None:
    layer = qkv(config(attention("2x8g8", "2x8g8", "4x8g8")))
    for shard, (out, scheme) in zip(
        "qkv", zip(QKV.values(), ("2x8g8", "2x8g8", "4x8g8"), strict=True), strict=True
    ):
        load(layer, source(scheme, out), shard)
    assert [tuple(layer.codebooks.shape), tuple(layer.codebooks_1.shape)] == [
        (2, 2, 256, 1, 8),
        (1, 4, 256, 1, 8),
    ]
    layer.quant_method.process_weights_after_loading(layer)
    assert [product.sizes for product in layer.aqlm_products] == [[128, 32], [32]]


def attention(*schemes: str) -> dict[str, str]:
    return {f"{ATTENTION}.{name}": text for name, text in zip(QKV, schemes, strict=True)}


@pytest.mark.parametrize("part", ["codes", "codebooks", "scales"])
@pytest.mark.parametrize("missing", ["k", "v"])
def test_a_missing_tensor_of_any_scheme_is_refused_by_its_name(
    part: str, missing: str, be: Any, x: Tensor
) -> None:
    schemes = "2x8g8", "2x8g8", "4x8g8"
    layer = qkv(config(attention(*schemes)))
    for shard, out, scheme in zip("qkv", QKV.values(), schemes, strict=True):
        load(layer, source(scheme, out), shard, skip=part if shard == missing else "")
    with pytest.raises(CheckpointError, match=f"lacks {ATTENTION}.{missing}_proj.{part}, needed"):
        run(layer, x)


def test_one_tensor_for_layers_of_several_schemes_is_refused(be: Any) -> None:
    layer = qkv(config(attention("2x8g8", "2x8g8", "4x8g8")))
    codes = source("2x8g8", sum(QKV.values())).codes
    with pytest.raises(CheckpointError, match=r"qkv_proj as one layer, to parts of which .*differ"):
        layer.codes.weight_loader(layer.codes, codes)


def test_layers_that_vllm_splits_in_its_own_way_need_one_scheme(be: Any) -> None:
    schemes = {f"{MLP}.pair": "2x8g8", f"{MLP}.last": "4x8g8"}
    made = config(schemes)
    made.packed_modules_mapping = {"gate_up_proj": ["pair", "last"]}
    make = vllm_linear.MergedColumnParallelLinear
    name = f"{MLP}.gate_up_proj"
    with pytest.raises(ServeError, match=r"pair 2x8g8, .*last 4x8g8; give these layers one scheme"):
        make(HIDDEN, [32, 32, 32], bias=False, quant_config=made, prefix=name)


# ---- names


def test_a_layer_that_the_checkpoint_says_nothing_of_is_refused(be: Any) -> None:
    schemes = attention("2x8g8", "2x8g8", "4x8g8")
    del schemes[f"{ATTENTION}.k_proj"]
    with pytest.raises(CheckpointError, match=rf"does not say what {ATTENTION}.k_proj is: list it"):
        qkv(config(schemes))


def test_names_that_no_layer_has_are_refused_after_loading(be: Any, x: Tensor) -> None:
    layer = qkv(config(attention("2x8g8", "2x8g8", "4x8g8") | {f"{MLP}.fc1": "2x8g8"}))
    with pytest.raises(ServeError, match=rf"holds codes for {MLP}.fc1, which vLLM's model keeps"):
        run(layer, x)


# ---- draft models


def initialize_model(model_config: Any, prefix: str, make: Any) -> Any:
    """vLLM's function of this name, as far as it is looked at."""
    return make()


def test_a_draft_models_names_lose_its_own(be: Any) -> None:
    made = config(attention("2x8g8", "2x8g8", "4x8g8"), dense=("model.layers.1.mlp.down_proj",))
    made.model = "draft"
    model = SimpleNamespace(model="draft", quantization="aqlm")
    prefix = "draft_model"
    layer = initialize_model(model, prefix, lambda: qkv(made, f"{prefix}."))
    assert layer.aqlm_load.prefix == f"{ATTENTION}.qkv_proj"
    assert [str(run.scheme) for run in layer.aqlm_load.runs] == ["2x8g8", "4x8g8"]
    name = f"{prefix}.model.layers.1.mlp.down_proj"
    make = vllm_linear.RowParallelLinear
    down = initialize_model(
        model, prefix, lambda: make(INNER, HIDDEN, quant_config=made, prefix=name)
    )
    assert isinstance(down.quant_method, vllm_linear.UnquantizedLinearMethod)


def under_target(folder: Path, schemes: dict[str, str]) -> Any:
    """vLLM's configuration of a target model in codes."""
    current = vllm_config.VllmConfig()
    current.quant_config = target = config(schemes)
    target.model = str(folder)
    shape = Scheme.parse("2x8g8").codes_shape(VOCABULARY, HIDDEN)
    target.layers.read_ends({"model.embed_tokens.codes": shape}, tied=False)
    return current


def embedding(made: AQLMConfig | None) -> Any:
    make = vllm_embedding.VocabParallelEmbedding
    return make(VOCABULARY, HIDDEN, params_dtype=torch.float32, quant_config=made)


@pytest.mark.parametrize("handed", [False, True])
def test_a_dense_draft_model_stays_dense_under_a_target_in_codes(
    handed: bool, tmp_path: Path, be: Any
) -> None:
    toy_model("llama").save_pretrained(tmp_path / "draft")
    draft = vllm_config.ModelConfig(str(tmp_path / "draft"), skip_tokenizer_init=True)
    schemes = attention("2x8g8", "2x8g8", "4x8g8") | {"model.embed_tokens": "2x8g8"}
    current = under_target(tmp_path / "target", schemes)
    target = current.quant_config
    with vllm_config.set_current_vllm_config(current):
        own = initialize_model(draft, "", lambda: embedding(target if handed else None))
        layer = initialize_model(draft, "", lambda: qkv(target))
    assert isinstance(own.quant_method, vllm_embedding.UnquantizedEmbeddingMethod)
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)


@pytest.mark.parametrize("target_in_codes", [False, True])
def test_a_draft_model_in_codes_has_its_own_schemes(
    target_in_codes: bool, tmp_path: Path, be: Any
) -> None:
    register()
    write_toy(tmp_path, "llama", "3x8g8", embeddings="2x8g4", schemes={"v_proj": "4x8g8"})
    draft = vllm_config.ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    schemes = attention("2x8g8", "2x8g8", "2x8g4") | {"model.embed_tokens": "2x8g8"}
    current = vllm_config.VllmConfig()
    if target_in_codes:
        current = under_target(tmp_path / "target", schemes)
    with vllm_config.set_current_vllm_config(current):
        own = initialize_model(draft, "", lambda: embedding(None))
        assert isinstance(own.quant_method, AQLMEmbeddingMethod)
        assert str(own.quant_method.end.scheme) == "2x8g4"
        if target_in_codes:
            layer = initialize_model(draft, "", lambda: qkv(current.quant_config))
            assert isinstance(layer.quant_method, AQLMLinearMethod)
            assert [str(run.scheme) for run in layer.aqlm_load.runs] == ["3x8g8", "4x8g8"]
