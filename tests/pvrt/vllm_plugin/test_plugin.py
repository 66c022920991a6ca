"""vLLM's own linear layers on AQLM weights: loading, splitting over ranks, refusing; no engine."""

import gc
import importlib.metadata
import logging
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("vllm")

from vllm import config as vllm_config
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers import quantization as vllm_quantization
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from pvrt.errors import CheckpointError, ServeError
from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.config_block import quantization_config
from pvrt.format.scheme import Scheme
from pvrt.vllm_plugin.linear import AQLMLinearMethod
from pvrt.vllm_plugin.plugin import AQLMConfig, register
from pvrt_kernels import aqlm_dequantize, reference
from pvrt_kernels.dispatch import Kernel, PackedKernel, registry
from tests.fixtures.toy import random_layer
from tests.fixtures.turning import turning

PATHS = ["packed_kernel", "kernel", "no_kernel"]
SCHEMES = ["2x8g8", "1x16g8", "1x12g8", "2x8g8o4", "4x8g16"]
HIDDEN, INNER, HEAD, HEADS, KV_HEADS = 128, 256, 16, 8, 2
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
KERNEL = Kernel("every", lambda problem: True, reference.linear)


class Transposed(NamedTuple):
    codes: Tensor
    codebooks: Tensor
    scales: Tensor


PACKED = PackedKernel(
    "every",
    lambda problem: True,
    Transposed,
    lambda codes, codebooks, scales, sizes: Transposed(
        codes.transpose(0, 1).clone(), codebooks, scales
    ),
    lambda packed, in_features: (packed.codes.transpose(0, 1), packed.codebooks, packed.scales),
    lambda x, packed, bias, sizes: reference.linear(
        x, packed.codes.transpose(0, 1), packed.codebooks, packed.scales, bias, sizes
    ),
)


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with vllm_config.set_current_vllm_config(vllm_config.VllmConfig()):
        yield


@pytest.fixture
def no_kernel() -> Iterator[None]:
    with registry.using():
        yield


@pytest.fixture
def kernel() -> Iterator[None]:
    with registry.using(KERNEL):
        yield


@pytest.fixture
def packed_kernel() -> Iterator[None]:
    with registry.using(PACKED):
        yield


@pytest.fixture(params=PATHS)
def all_paths(request: pytest.FixtureRequest) -> None:
    """In a kernel's own layout, in the checkpoint's, and decoded once where there is no kernel."""
    request.getfixturevalue(request.param)


class Ranks:
    """Tensor parallelism without processes: vLLM is told to be one rank after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def be(self, rank: int, size: int) -> None:
        for module in (vllm_parameter, vllm_linear):
            self.monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            self.monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks(monkeypatch)
    ranks.be(0, 1)
    return ranks


def config(scheme: str = "2x8g8", **block: Any) -> AQLMConfig:
    whole = {**quantization_config({"model.layers": Scheme.parse(scheme)}, ["lm_head"]), **block}
    made = AQLMConfig.from_config(whole)
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return made


def source(scheme: str, out: int, in_features: int, seed: int = 0) -> QuantizedLayer:
    bias = torch.randn(out, generator=torch.Generator().manual_seed(seed))
    return random_layer(Scheme.parse(scheme), out, in_features, seed=seed, bias=bias)


def qkv_sources(scheme: str = "2x8g8") -> list[QuantizedLayer]:
    sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
    return [source(scheme, size, HIDDEN, seed) for seed, size in enumerate(sizes)]


def qkv(made: AQLMConfig, bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return vllm_linear.QKVParallelLinear(
        HIDDEN,
        HEAD,
        HEADS,
        KV_HEADS,
        bias=bias,
        quant_config=made,
        params_dtype=dtype,
        prefix=f"{ATTENTION}.qkv_proj",
    )


def merged(made: AQLMConfig, sizes: list[int], bias: bool = False) -> Any:
    return vllm_linear.MergedColumnParallelLinear(
        HIDDEN,
        sizes,
        bias=bias,
        quant_config=made,
        params_dtype=torch.float32,
        prefix=f"{MLP}.gate_up_proj",
    )


def single(kind: str, made: AQLMConfig, out: int, in_features: int, bias: bool = False) -> Any:
    return getattr(vllm_linear, kind)(
        in_features,
        out,
        bias=bias,
        quant_config=made,
        params_dtype=torch.float32,
        prefix=f"{MLP}.down_proj",
    )


def down(made: AQLMConfig | None = None, bias: bool = False) -> Any:
    return single("RowParallelLinear", made or config(), HIDDEN, INNER, bias)


def put(layer: Any, part: str, tensor: Tensor, shard: Any = None) -> None:
    """What vLLM's models do with one tensor of a checkpoint."""
    parameter = getattr(layer, part)
    parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def load(layer: Any, tensors: QuantizedLayer, shard: Any = None, skip: str = "") -> Any:
    for name, tensor in tensors.named("layer"):
        part = name.removeprefix("layer.")
        if part != skip and not (part == "bias" and layer.bias is None):
            put(layer, part, tensor, shard)
    return layer


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = layer.quant_method.apply(layer, x, bias)
    return output


def dense(tensors: QuantizedLayer, x: Tensor, bias: bool = False) -> Tensor:
    weight = aqlm_dequantize(tensors.codes, tensors.codebooks, tensors.scales)
    return F.linear(x, weight, tensors.bias if bias else None)


def share(whole: Tensor, rank: int, size: int) -> Tensor:
    """A rank's part of the last dimension."""
    return whole.chunk(size, -1)[rank]


def qkv_share(q: Tensor, k: Tensor, v: Tensor, rank: int, size: int) -> Tensor:
    kv_size = min(size, KV_HEADS)  # with 4 ranks, two of them hold the same head
    kv_rank = rank * kv_size // size
    return torch.cat(
        [share(q, rank, size), share(k, kv_rank, kv_size), share(v, kv_rank, kv_size)], -1
    )


def inputs(features: int) -> Tensor:
    return torch.randn(5, features, generator=torch.Generator().manual_seed(7))


# ---- values

over_splits = pytest.mark.parametrize(
    ("scheme", "size", "all_paths"), turning(SCHEMES, [1, 2, 4], PATHS), indirect=["all_paths"]
)


@over_splits
def test_a_fused_qkv_layer_computes_what_its_source_layers_do(
    scheme: str, size: int, ranks: Ranks, all_paths: None
) -> None:
    sources, x = qkv_sources(scheme), inputs(HIDDEN)
    q, k, v = (dense(tensors, x, bias=True) for tensors in sources)
    for rank in range(size):
        ranks.be(rank, size)
        layer = qkv(config(scheme), bias=True)
        for shard, tensors in zip("qkv", sources, strict=True):
            load(layer, tensors, shard)
        output = run(finish(layer), x, layer.bias)
        torch.testing.assert_close(output, qkv_share(q, k, v, rank, size))


@over_splits
def test_a_fused_gate_up_layer_computes_what_its_source_layers_do(
    scheme: str, size: int, ranks: Ranks, all_paths: None
) -> None:
    sources, x = [source(scheme, INNER, HIDDEN, seed) for seed in range(2)], inputs(HIDDEN)
    for rank in range(size):
        ranks.be(rank, size)
        layer = merged(config(scheme), [INNER, INNER])
        for shard, tensors in enumerate(sources):
            load(layer, tensors, shard)
        expected = torch.cat([share(dense(tensors, x), rank, size) for tensors in sources], -1)
        torch.testing.assert_close(run(finish(layer), x), expected)


@over_splits
def test_an_mlp_that_the_checkpoint_stores_fused_keeps_its_one_codebook_set(
    scheme: str, size: int, ranks: Ranks, all_paths: None
) -> None:
    fused, x = source(scheme, 2 * INNER, HIDDEN), inputs(HIDDEN)
    gate, up = dense(fused, x, bias=True).chunk(2, -1)
    for rank in range(size):
        ranks.be(rank, size)
        layer = finish(load(merged(config(scheme), [INNER, INNER], bias=True), fused))
        expected = torch.cat([share(gate, rank, size), share(up, rank, size)], -1)
        torch.testing.assert_close(run(layer, x, layer.bias), expected)


@over_splits
def test_attention_that_the_checkpoint_stores_fused_keeps_its_one_codebook_set(
    scheme: str, size: int, ranks: Ranks, all_paths: None
) -> None:
    sizes, x = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], inputs(HIDDEN)
    fused = source(scheme, sum(sizes), HIDDEN)
    q, k, v = torch.split(dense(fused, x, bias=True), sizes, -1)
    for rank in range(size):
        ranks.be(rank, size)
        layer = finish(load(qkv(config(scheme), bias=True), fused))
        expected = qkv_share(q, k, v, rank, size)
        torch.testing.assert_close(run(layer, x, layer.bias), expected)


@pytest.mark.parametrize("size", [1, 2])
def test_one_tensor_may_hold_some_of_the_source_layers(
    size: int, ranks: Ranks, all_paths: None
) -> None:
    pair, last, x = source("2x8g8o4", 96, HIDDEN), source("2x8g8o4", 32, HIDDEN, 1), inputs(HIDDEN)
    outputs = torch.split(torch.cat([dense(pair, x), dense(last, x)], -1), [64, 32, 32], -1)
    for rank in range(size):
        ranks.be(rank, size)
        layer = merged(config("2x8g8o4"), [64, 32, 32])
        load(layer, pair, (0, 1))
        load(layer, last, 2)
        expected = torch.cat([share(output, rank, size) for output in outputs], -1)
        torch.testing.assert_close(run(finish(layer), x), expected)


@over_splits
def test_row_parallel_ranks_add_up_to_the_whole_layer(
    scheme: str, size: int, ranks: Ranks, all_paths: None
) -> None:
    tensors, x = source(scheme, HIDDEN, INNER), inputs(INNER)
    total = torch.zeros(5, HIDDEN)
    for rank in range(size):
        ranks.be(rank, size)
        layer = finish(load(down(config(scheme), bias=True), tensors))
        total += run(layer, share(x, rank, size), layer.bias if rank == 0 else None)
    torch.testing.assert_close(total, dense(tensors, x, bias=True))


@over_splits
def test_column_parallel_ranks_hold_their_rows_and_replicas_hold_all(
    scheme: str, size: int, ranks: Ranks, all_paths: None
) -> None:
    tensors, x = source(scheme, INNER, HIDDEN), inputs(HIDDEN)
    whole = dense(tensors, x, bias=True)
    for rank in range(size):
        ranks.be(rank, size)
        expected = {"ColumnParallelLinear": share(whole, rank, size), "ReplicatedLinear": whole}
        for kind, output in expected.items():
            layer = finish(load(single(kind, config(scheme), INNER, HIDDEN, bias=True), tensors))
            torch.testing.assert_close(run(layer, x, layer.bias), output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_stay_in_their_dtype(
    dtype: torch.dtype, ranks: Ranks, all_paths: None
) -> None:
    sources, x = qkv_sources(), inputs(HIDDEN)
    layer = qkv(config(), dtype=dtype)
    for shard, tensors in zip("qkv", sources, strict=True):
        load(layer, tensors, shard)
    output = run(finish(layer), x.to(dtype))
    assert output.dtype == dtype
    expected = torch.cat([dense(tensors, x) for tensors in sources], -1)
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


def test_inputs_may_have_any_leading_dimensions(ranks: Ranks, all_paths: None) -> None:
    tensors, x = source("2x8g8", HIDDEN, INNER), inputs(INNER)
    layer = finish(load(down(), tensors))
    torch.testing.assert_close(run(layer, x[None]), dense(tensors, x)[None])
    assert run(layer, x[:0]).shape == (0, HIDDEN)


def test_wider_integers_load_as_the_same_codes(ranks: Ranks, all_paths: None) -> None:
    tensors, x = source("2x8g8", HIDDEN, INNER), inputs(INNER)
    layer = load(down(), tensors, skip="codes")
    put(layer, "codes", tensors.codes.to(torch.int32) & 255)
    torch.testing.assert_close(run(finish(layer), x), dense(tensors, x))


# ---- what stays in memory


def test_without_a_kernel_only_a_dense_weight_stays_and_the_cost_is_told_once(
    ranks: Ranks,
    no_kernel: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM's loggers may or may not pass messages on to the root, where caplog listens.
    monkeypatch.setattr(logging.getLogger("vllm.pvrt"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("vllm.pvrt"), "propagate", False)
    made = config()
    layers = [finish(load(down(made), source("2x8g8", HIDDEN, INNER))) for _ in range(2)]
    assert [name for name, _ in layers[1].named_parameters()] == ["weight"]
    packed = HIDDEN * INNER // 8 * 2 + 2 * 256 * 8 * 4 + HIDDEN * 4
    (message,) = caplog.messages
    assert "2x8g8" in message
    assert f"{HIDDEN * INNER * 4} bytes instead of {packed}" in message


def test_with_a_kernel_weights_stay_packed(ranks: Ranks, kernel: None) -> None:
    layer = finish(load(down(), source("2x8g8", HIDDEN, INNER)))
    assert [name for name, _ in layer.named_parameters()] == ["codes", "codebooks", "scales"]


def test_a_kernels_own_layout_replaces_the_checkpoints(ranks: Ranks, packed_kernel: None) -> None:
    tensors = source("2x8g8", HIDDEN, INNER)
    layer = finish(load(down(), tensors))
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["packed_codes", "packed_codebooks", "packed_scales"]
    held = sum(parameter.nbytes for parameter in layer.parameters())
    parts = (tensors.codes, tensors.codebooks, tensors.scales)
    assert held == sum(tensor.nbytes for tensor in parts)
    moved = torch.nn.Parameter(layer.packed_codes.clone(), requires_grad=False)
    layer.packed_codes = moved
    x = inputs(INNER)
    torch.testing.assert_close(run(layer, x), dense(tensors, x))


def test_lora_finds_the_device_of_a_layer(ranks: Ranks, all_paths: None) -> None:
    layer = finish(load(down(), source("2x8g8", HIDDEN, INNER)))
    assert _get_lora_device(layer) == torch.device("cpu")


def test_processing_twice_changes_nothing(ranks: Ranks, all_paths: None) -> None:
    tensors, x = source("2x8g8", HIDDEN, INNER), inputs(INNER)
    layer = finish(finish(load(down(), tensors)))
    torch.testing.assert_close(run(layer, x), dense(tensors, x))


def test_a_second_load_is_checked_like_the_first(ranks: Ranks, all_paths: None) -> None:
    tensors, layer = source("2x8g8", HIDDEN, INNER), down()
    parameters = dict(layer.named_parameters())
    finish(load(layer, tensors))
    for name, parameter in parameters.items():  # as vLLM does to load weights again
        layer.register_parameter(name, parameter)
    load(layer, tensors, skip="codes")
    with pytest.raises(CheckpointError, match=r"lacks .*down_proj.codes,"):
        finish(layer)


def test_vllms_table_for_reloading_does_not_keep_a_dropped_layer_alive(ranks: Ranks) -> None:
    layer = down(bias=True)
    record_metadata_for_reloading(layer)
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None


# ---- refusals


@pytest.mark.parametrize(
    ("part", "shard"), [("codes", "q"), ("codebooks", "k"), ("scales", "v"), ("bias", "q")]
)
def test_a_missing_tensor_of_a_fused_layer_is_refused_by_its_name(
    part: str, shard: str, ranks: Ranks
) -> None:
    layer = qkv(config(), bias=True)
    for name, tensors in zip("qkv", qkv_sources(), strict=True):
        load(layer, tensors, name, skip=part if name == shard else "")
    with pytest.raises(CheckpointError, match=f"lacks {ATTENTION}.{shard}_proj.{part}, needed"):
        finish(layer)


def test_a_layer_without_any_tensor_is_refused(ranks: Ranks) -> None:
    everything = ", ".join(f"{MLP}.down_proj.{part}" for part in ("codes", "codebooks", "scales"))
    with pytest.raises(CheckpointError, match=f"lacks {everything}, needed"):
        finish(down())


def test_dummy_weights_pass(ranks: Ranks, all_paths: None) -> None:
    layer = qkv(config(), bias=True)
    for parameter in layer.parameters():  # all that --load-format dummy does
        initialize_single_dummy_weight(parameter)
    assert torch.isfinite(run(finish(layer), inputs(HIDDEN), layer.bias)).all()


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ("codes", (HIDDEN, INNER // 8, 3)),
        ("codes", (HIDDEN, INNER // 16, 2)),
        ("codes", (2 * HIDDEN, INNER // 8, 2)),
        ("codebooks", (2, 128, 1, 8)),
        ("scales", (HIDDEN,)),
        ("bias", (HIDDEN + 1,)),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_wrong_shape_is_refused_with_both_shapes(
    part: str, shape: tuple[int, ...], size: int, ranks: Ranks
) -> None:
    ranks.be(size - 1, size)
    layer = down(bias=True)
    wrong = torch.zeros(shape, dtype=torch.int8 if part == "codes" else torch.float32)
    right = dict(source("2x8g8", HIDDEN, INNER).named("layer"))[f"layer.{part}"].shape
    with pytest.raises(CheckpointError) as caught:
        put(layer, part, wrong)
    assert f"{MLP}.down_proj.{part} has shape {list(shape)}" in str(caught.value)
    assert f"need {list(right)}" in str(caught.value)


def test_too_many_rows_are_refused_although_vllm_would_take_the_first(ranks: Ranks) -> None:
    tall = source("2x8g8", 2 * HEADS * HEAD, HIDDEN)
    with pytest.raises(CheckpointError, match=r"q_proj.codes has shape \[256, 16, 2\].*\[128, "):
        put(qkv(config()), "codes", tall.codes, "q")


def test_codes_outside_the_codebook_are_refused_by_name(ranks: Ranks) -> None:
    codes = source("1x12g8", KV_HEADS * HEAD, HIDDEN).codes
    codes[3, 4, 0] = 4096
    with pytest.raises(CheckpointError, match=r"k_proj.codes holds code 4096, .* 0 to 4095"):
        put(qkv(config("1x12g8")), "codes", codes, "k")


@pytest.mark.parametrize(("part", "dtype"), [("codes", torch.float32), ("scales", torch.int8)])
def test_a_tensor_of_the_wrong_kind_of_type_is_refused(
    part: str, dtype: torch.dtype, ranks: Ranks
) -> None:
    tensor = getattr(source("2x8g8", HIDDEN, INNER), part).to(dtype)
    with pytest.raises(CheckpointError, match=f"down_proj.{part} cannot be of type {dtype}"):
        put(down(), part, tensor)


def test_scales_beyond_the_models_dtype_are_refused(ranks: Ranks) -> None:
    layer = qkv(config(), dtype=torch.float16)
    for shard, tensors in zip("qkv", qkv_sources(), strict=True):
        load(layer, tensors, shard)
        put(layer, "scales", tensors.scales * 1e8, shard)
    with pytest.raises(CheckpointError, match=r"qkv_proj.scales holds .* not finite in .*float16"):
        finish(layer)


def test_a_dense_weight_in_a_fused_quantised_layer_is_refused(ranks: Ranks) -> None:
    weight: Any = torch.zeros(HEADS * HEAD, HIDDEN)
    weight.shard_id = "q"
    with pytest.raises(CheckpointError, match=r"dense weight for .*q_proj, .*not_to_quantize"):
        list(qkv(config()).load_weights([("weight", weight)]))


@pytest.mark.parametrize(
    ("kind", "scheme", "out", "in_features"),
    [("RowParallelLinear", "2x8g8", 64, 48), ("ColumnParallelLinear", "2x8g8o4", 24, 64)],
)
def test_ranks_that_would_cut_through_groups_are_refused(
    kind: str, scheme: str, out: int, in_features: int, ranks: Ranks
) -> None:
    single(kind, config(scheme), out, in_features)
    ranks.be(0, 4)
    with pytest.raises(ServeError, match=f"down_proj: groups of {scheme} .*tensor-parallel-size"):
        single(kind, config(scheme), out, in_features)


def test_a_layer_that_groups_never_divide_is_refused_as_such(ranks: Ranks) -> None:
    with pytest.raises(CheckpointError, match=r"down_proj: groups of 2x8g8 .* 64 x 44 weights; if"):
        single("RowParallelLinear", config(), 64, 44)


def test_a_malformed_configuration_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"config.json.* lacks .*out_group_size"):
        AQLMConfig.from_config({"quant_method": "aqlm", "num_codebooks": 2, "in_group_size": 8})


# ---- what is quantised, and registering


@pytest.mark.parametrize(
    "block",
    [
        {"linear_weights_not_to_quantize": [f"{MLP}.down_proj.weight"]},
        {"linear_weights_not_to_quantize": [f"{MLP}.down_proj$"]},
        {"modules_to_not_convert": [f"{MLP}.down_proj"], "linear_weights_not_to_quantize": None},
        {"modules_to_not_convert": [MLP]},
    ],
)
def test_modules_that_the_checkpoint_keeps_dense_stay_dense(
    block: dict[str, Any], ranks: Ranks
) -> None:
    made = config(**block)
    assert isinstance(down(made).quant_method, vllm_linear.UnquantizedLinearMethod)
    assert isinstance(qkv(made).quant_method, AQLMLinearMethod)


def test_a_fused_layer_is_dense_when_all_its_source_layers_are(ranks: Ranks) -> None:
    names = [f"{ATTENTION}.{name}_proj.weight" for name in "qkv"]
    made = config(linear_weights_not_to_quantize=names)
    assert isinstance(qkv(made).quant_method, vllm_linear.UnquantizedLinearMethod)
    with pytest.raises(ValueError, match="some but not all"):
        qkv(config(linear_weights_not_to_quantize=names[:1]))


def test_the_skip_list_follows_a_model_that_renames_its_modules() -> None:
    class Mapper:
        def apply_list(self, names: list[str]) -> list[str]:
            return [f"language_model.{name}" for name in names]

    made = config()
    made.apply_vllm_mapper(Mapper())
    assert made.layers.dense == ["language_model.lm_head"]


def test_layers_that_are_not_linear_are_left_to_vllm() -> None:
    assert config().get_quant_method(torch.nn.Embedding(2, 2), "") is None


def test_registering_twice_leaves_one_method() -> None:
    register()
    register()
    assert vllm_quantization.get_quantization_config("aqlm") is AQLMConfig
    assert vllm_quantization.QUANTIZATION_METHODS.count("aqlm") == 1


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    (entry,) = [entry for entry in entries if entry.name == "pvrt"]
    assert entry.load() is register


@pytest.mark.slow
def test_registering_touches_no_gpu_and_imports_no_layers() -> None:
    code = """
import sys, torch
from pvrt.vllm_plugin.plugin import register
register()
assert not torch.cuda.is_initialized()
assert "vllm.model_executor.layers.linear" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tables_of_the_documentation_come_from_the_result_files() -> None:
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, str(root / "benchmarks" / "vllm_tables.py"), "--check"]
    assert subprocess.run(command).returncode == 0
