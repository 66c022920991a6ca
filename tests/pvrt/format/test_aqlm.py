"""Reading and writing the AQLM layout; every violation is one sentence with file and tensor."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pvrt.errors import CheckpointError
from pvrt.format.aqlm import Checkpoint
from pvrt.format.config_block import quantization_config, skipped_modules
from pvrt.format.scheme import Scheme
from pvrt.format.write import WriteOptions, write_checkpoint
from tests.fixtures.full_disk import full_disk
from tests.fixtures.toy import random_layer, write_toy

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_toy(tmp_path / "toy", "qwen2")
    return tmp_path / "toy"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("scheme", ["2x8g8", "1x16g8", "2x12g8"])
def test_what_is_written_is_read(tmp_path: Path, architecture: str, scheme: str) -> None:
    write_toy(tmp_path, architecture, scheme, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.verify()
    assert checkpoint.scheme_names == scheme
    assert checkpoint.layers[LAYER].has_bias is (architecture == "qwen2")
    assert ("lm_head.weight" in checkpoint.tensors) is (architecture != "llama-tied")
    layer = checkpoint.read_layer(LAYER)
    assert layer.codebooks.dtype is torch.bfloat16
    assert layer.codes.dtype is Scheme.parse(scheme).code_dtype


def test_shards_hold_the_same_tensors_as_a_single_file(tmp_path: Path) -> None:
    write_toy(tmp_path / "one")
    write_toy(tmp_path / "many", options=WriteOptions(max_shard_bytes=100_000))
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert len({info.file for info in many.tensors.values()}) > 2
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)
    assert one.linear_bits_per_weight() == many.linear_bits_per_weight()


def test_the_manifest_holds_the_hash_of_every_tensor(folder: Path) -> None:
    manifest = json.loads((folder / "pvrt.json").read_text())
    assert manifest["tensor_sha256"].keys() == Checkpoint.open(folder).tensors.keys()


def test_unsigned_and_wide_codes_read_like_wrapped_ones(folder: Path) -> None:
    before = Checkpoint.open(folder).read_layer(LAYER).codes

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.codes"] = tensors[f"{LAYER}.codes"].to(torch.int32) & 255

    edit_tensors(folder, widen)
    after = Checkpoint.open(folder).read_layer(LAYER).codes
    assert after.dtype is torch.int8
    assert torch.equal(before, after)


def test_bits_count_codebooks_scales_and_dense_tensors(tmp_path: Path) -> None:
    write_toy(tmp_path, "llama-tied", dtype=torch.float16)
    checkpoint = Checkpoint.open(tmp_path)
    scheme = Scheme.parse("2x8g8")
    bits = sum(scheme.layer_bits(x.out_features, x.in_features) for x in checkpoint.layers.values())
    weights = sum(x.out_features * x.in_features for x in checkpoint.layers.values())
    assert checkpoint.linear_bits_per_weight() == pytest.approx(bits / weights)
    dense = sum(checkpoint.dense_bytes().values())
    stored = bits / 8 + dense
    assert checkpoint.file_bytes() == pytest.approx(stored, rel=0.05)  # headers beside it
    assert checkpoint.file_bits_per_weight() > checkpoint.linear_bits_per_weight()


def test_the_skip_list_has_both_spellings_and_anchors_prefixes() -> None:
    linears = dict.fromkeys(["a.mlp.gate_proj", "a.q_proj"], Scheme.parse("2x8g8"))
    block = quantization_config(linears, ["lm_head", "a.mlp.gate"])
    assert block["linear_weights_not_to_quantize"] == [
        "lm_head",
        "lm_head.weight",
        "a.mlp.gate$",
        "a.mlp.gate.weight",
    ]
    assert skipped_modules(block) == ["lm_head", "a.mlp.gate"]


MIXED = {"q_proj": "4x8g8", "down_proj": "3x8g16", "layers.1.mlp.up_proj": "1x8g8"}


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_layers_of_several_schemes_are_read(tmp_path: Path, architecture: str) -> None:
    """The four numbers of the published block then stop every reader that knows no other."""
    write_toy(tmp_path, architecture, embeddings="2x8g4", schemes=MIXED)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.verify()
    schemes = {name: str(layer.scheme) for name, layer in checkpoint.layers.items()}
    ends = {"model.embed_tokens"} | ({"lm_head"} if architecture == "llama" else set())
    assert {name for name, scheme in schemes.items() if scheme == "2x8g4"} == ends
    assert schemes["model.layers.0.self_attn.q_proj"] == "4x8g8"
    assert schemes["model.layers.0.mlp.up_proj"] == "2x8g8"
    assert schemes["model.layers.1.mlp.up_proj"] == "1x8g8"
    assert set(checkpoint.scheme_names.split("+")) == set(schemes.values())
    block = checkpoint.config["quantization_config"]
    assert not any(isinstance(block[key], int) for key in block)
    from transformers.utils.quantization_config import AqlmConfig

    with pytest.raises(TypeError, match="must be an int"):
        AqlmConfig.from_dict(block)


BROKEN_SCHEMES: dict[str, tuple[Any, str]] = {
    "none": (None, "schemes must map"),
    "a list": (["2x8g8"], "schemes must map"),
    "no scheme": ({"two bits": ["model.embed_tokens"]}, "'two bits' is not a scheme"),
    "impossible": ({"2x99g8": ["model.embed_tokens"]}, "nbits_per_codebook must be"),
    "no names": ({"2x8g4": "model.embed_tokens"}, "2x8g4 must have a list"),
    "twice": ({"2x8g4": ["a", "a"]}, "names a twice"),
    "unknown": ({"2x8g4": ["a"]}, "has a scheme for a, whose codes are missing"),
    "too few": ({"2x8g4": ["model.embed_tokens"]}, "has no scheme for model.layers.0"),
    "another shape": ({"4x8g4": ["model.embed_tokens"]}, "scheme 4x8g4 needs"),
}


@pytest.mark.parametrize("case", BROKEN_SCHEMES)
def test_broken_lists_of_schemes_are_refused(tmp_path: Path, case: str) -> None:
    write_toy(tmp_path, "llama-tied", embeddings="2x8g4")
    schemes, sentence = BROKEN_SCHEMES[case]
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["schemes"] = schemes
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.open(tmp_path)


def test_transformers_5_reads_our_skip_list_as_we_mean_it() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    quantised = ["model.layers.1.mlp.gate_proj", "model.layers.10.mlp.gate_proj"]
    linears = dict.fromkeys(quantised, Scheme.parse("2x8g8"))
    block = quantization_config(linears, ["lm_head", "model.layers.1.mlp.gate"])
    patterns = block["linear_weights_not_to_quantize"]
    assert all(should_convert_module(name, patterns) for name in quantised)
    assert not should_convert_module("lm_head", patterns)
    assert not should_convert_module("model.layers.1.mlp.gate", patterns)


def spoil(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit_tensors(folder, lambda tensors: tensors.update({name: value(tensors[name])}))

    return change


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def configure(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(
        folder, lambda config: config["quantization_config"].update(values)
    )


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 50_000),
        "model.safetensors is damaged or cut short",
    ),
    "no block": (
        lambda f: edit_config(f, lambda c: c.pop("quantization_config")),
        "no quantization_config",
    ),
    "foreign method": (configure(quant_method="gptq"), "quant_method is 'gptq'"),
    "zero group": (configure(in_group_size=0), "in_group_size must be an integer from 1"),
    "text for number": (configure(num_codebooks="2"), "num_codebooks must be an integer"),
    "bad skip list": (
        configure(linear_weights_not_to_quantize="lm_head"),
        "must be a list of strings",
    ),
    "scheme against codes": (configure(num_codebooks=3), rf"{LAYER[:14]}.*scheme 3x8g8"),
    "scheme against codebooks": (
        configure(nbits_per_codebook=7),
        r"codebooks has shape \[2, 256, 1, 8\]",
    ),
    "no codebooks": (drop(f"{LAYER}.codebooks"), rf"{LAYER}.codes has no {LAYER}.codebooks"),
    "no scales": (drop(f"{LAYER}.scales"), rf"has no {LAYER}.scales"),
    "no codes": (drop(f"{LAYER}.codes"), rf"{LAYER}.codebooks has no {LAYER}.codes"),
    "short scales": (spoil(f"{LAYER}.scales", lambda t: t[1:]), f"{LAYER}.scales has shape"),
    "short bias": (spoil(f"{LAYER}.bias", lambda t: t[1:]), f"{LAYER}.bias has shape"),
    "float codes": (spoil(f"{LAYER}.codes", lambda t: t.float()), f"{LAYER}.codes is F32"),
    "integer scales": (spoil(f"{LAYER}.scales", lambda t: t.int()), f"{LAYER}.scales is I32"),
    "scaled columns in a block": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.in_scales": torch.ones(128)})),
        f"{LAYER} has in_scales, which only embeddings",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_before_weights_are_read(folder: Path, case: str) -> None:
    break_it, sentence = BROKEN[case]
    break_it(folder)
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.open(folder)


def test_scaled_columns_are_refused_where_one_scheme_has_all_layers(tmp_path: Path) -> None:
    """Readers of the published block know no factors, and would decode another weight."""
    write_toy(tmp_path, "llama", embeddings="2x8g8")
    numbers = {"num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8, "out_group_size": 1}
    configure(**numbers)(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head has in_scales, .* under schemes"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("value", [256, -129])
def test_codes_out_of_range_are_refused_by_name(folder: Path, value: int) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        codes = tensors[f"{LAYER}.codes"].to(torch.int16)
        codes[3, 2, 1] = value
        tensors[f"{LAYER}.codes"] = codes

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {LAYER}.codes holds code"):
        Checkpoint.open(folder).verify()


@pytest.mark.parametrize("tensor", [f"{LAYER}.codebooks", "model.norm.weight"])
def test_values_that_are_not_finite_are_refused(folder: Path, tensor: str) -> None:
    spoil(tensor, lambda t: t.fill_(float("inf")))(folder)
    with pytest.raises(CheckpointError, match=f"{tensor} holds values that are not finite"):
        Checkpoint.open(folder).verify()


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "../evil.safetensors"}}, "not a safetensors file name"),
        ({"weight_map": {"a": "evil.bin"}}, "not a safetensors file name"),
        ({"weight_map": {"a": "gone.safetensors"}}, "is missing from"),
    ],
)
def test_broken_indexes_are_refused(folder: Path, index: dict[str, Any], sentence: str) -> None:
    os.replace(folder / "model.safetensors", folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.open(folder)


def test_a_tensor_that_the_index_misplaces_is_named(tmp_path: Path) -> None:
    write_toy(tmp_path, options=WriteOptions(max_shard_bytes=200_000))
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    name = next(n for n, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = last
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"says that {name} is in {last}"):
        Checkpoint.open(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint_untouched(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refused = pytest.raises(CheckpointError, match="cannot write the checkpoint")
    with refused, full_disk(200_000):
        write_checkpoint(folder, {"a": 1}, [("w", torch.zeros(1_000_000))])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_fewer_shards_replace_more(tmp_path: Path) -> None:
    write_toy(tmp_path, options=WriteOptions(max_shard_bytes=100_000))
    write_toy(tmp_path, scheme="1x8g8")
    assert Checkpoint.open(tmp_path).scheme_names == "1x8g8"
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_tensor_given_twice_is_our_own_bug(tmp_path: Path) -> None:
    tensors = [("a", torch.zeros(1)), ("a", torch.zeros(1))]
    with pytest.raises(ValueError, match="given twice"):
        write_checkpoint(tmp_path, {}, tensors)
    assert not (tmp_path / "config.json").exists()


def test_random_layers_use_all_codes() -> None:
    layer = random_layer(Scheme.parse("1x8g8"), 64, 512)
    assert torch.unique(layer.codes).numel() == 256
