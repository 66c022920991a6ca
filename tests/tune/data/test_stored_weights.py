"""Files that hold less, more or something else than their model: an error, or a note."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pvrt.errors import CheckpointError, RunError, SourceError
from pvrt.format.aqlm import read_config
from pvrt.format.atomic import as_json
from pvrt_tune.data.source_model import load_skeleton, load_source
from tests.fixtures.toy import VOCABULARY, toy_model, toy_tokenizer

OPENERS = (load_source, load_skeleton)  # tune and plan


def written(folder: Path, architecture: str = "llama", **options: Any) -> Path:
    toy_model(architecture).to(torch.bfloat16).save_pretrained(folder, **options)
    toy_tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    (folder / "config.json").write_bytes(as_json({**read_config(folder), **settings}))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.arange(24)[None], use_cache=False).logits
    return found


def test_a_trained_head_is_kept_though_the_config_ties_it(tmp_path: Path) -> None:
    written(tmp_path, "llama-tied")
    head = torch.randn(VOCABULARY, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    source = load_source(str(tmp_path))
    assert "lm_head.weight" in source.outside("model.layers")
    assert not source.model.config.tie_word_embeddings
    assert any("output head" in note for note in source.notes)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(source.dense()), logits(expected))
    assert not load_skeleton(str(tmp_path)).all_tied_weights_keys


def test_a_head_that_is_the_embedding_stays_tied(tmp_path: Path) -> None:
    written(tmp_path, "llama-tied")
    name = "model.embed_tokens.weight"
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    source = load_source(str(tmp_path))
    assert "lm_head.weight" not in source.outside("model.layers")
    assert source.model.config.tie_word_embeddings and not source.notes


def test_an_embedding_that_is_stored_as_the_head_is_read(tmp_path: Path) -> None:
    written(tmp_path, "llama-tied")
    name = "model.embed_tokens.weight"
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(name)}))
    source = load_source(str(tmp_path))
    assert source.published(name) == name
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(source.dense()), logits(expected))


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_that_are_no_weights_are_refused(
    tmp_path: Path, opener: Callable[[str], Any], dtype: torch.dtype
) -> None:
    written(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(128, 128).to(dtype)}))
    with pytest.raises(SourceError, match=rf"model\.safetensors: {name} is stored as "):
        opener(str(tmp_path))


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "input_scale", "scales"])
def test_left_over_scales_are_refused(tmp_path: Path, suffix: str) -> None:
    written(tmp_path)
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(SourceError, match=rf"{name} is of quantised weights"):
        load_source(str(tmp_path))


def test_what_the_model_has_no_place_for_is_told(tmp_path: Path) -> None:
    written(tmp_path, "deepseek_v3")
    configure(tmp_path, num_nextn_predict_layers=1)

    def another_layer(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(128, 256)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # needs no line

    edit(tmp_path, another_layer)
    source = load_source(str(tmp_path))
    (note,) = source.notes
    assert "left out: model.layers.2." in note and "inv_freq" not in note
    assert source.model.config.num_nextn_predict_layers == 0


def test_a_config_with_fewer_layers_than_the_file_is_told(tmp_path: Path) -> None:
    configure(written(tmp_path), num_hidden_layers=1)
    (note,) = load_source(str(tmp_path)).notes
    assert "left out: model.layers.1.input_layernorm.weight to model.layers.1." in note


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, name: str, value: float) -> None:
    written(tmp_path)
    edit(tmp_path, lambda tensors: tensors[name].view(-1).__setitem__(-1, value))
    source = load_source(str(tmp_path))
    with pytest.raises(SourceError, match=rf"model\.safetensors: {name} holds {value} at \["):
        source.dense()
    with pytest.raises(SourceError, match=rf"{name} holds {value}"):
        source.read([name])


def test_a_number_beyond_the_type_of_the_config_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    configure(written(tmp_path), dtype="float16")
    edit(tmp_path, lambda tensors: tensors[name].view(-1).__setitem__(7, 1e5))
    with pytest.raises(SourceError, match=rf"{name} holds 99840.0 at \[0, 7\]: beyond float16"):
        load_source(str(tmp_path)).dense()


@pytest.mark.parametrize("opener", OPENERS)
def test_a_stray_file_beside_shards_is_refused(
    tmp_path: Path, opener: Callable[[str], Any]
) -> None:
    written(tmp_path, max_shard_size="200KB")
    save_file({"model.norm.weight": torch.ones(128)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="remove the one that is not of this model"):
        opener(str(tmp_path))


def test_a_block_whose_inputs_overflow_ends_the_run(tmp_path: Path) -> None:
    from pvrt_tune.data.activations import Activations, in_memory
    from pvrt_tune.model_blocks import find_blocks, observe
    from pvrt_tune.model_calls import record_inputs

    written(tmp_path)
    edit(tmp_path, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(1e30))
    source = load_source(str(tmp_path))
    tokens = torch.arange(32).view(4, 8)
    hidden = Activations(in_memory((4, 8, 128)), 4, "cpu")
    blocks = find_blocks(source.model)
    model = source.partial(source.outside(blocks.name), "cpu")
    arguments = record_inputs(model, blocks, tokens, 4, hidden)
    block = source.load("model.layers.0", "cpu", torch.float32)
    with pytest.raises(RunError, match=r"inputs of mlp\.down_proj are too large"):
        observe(block, hidden, arguments[0])
    with pytest.raises(RunError, match="batch 0 are not finite"):
        hidden[0] = torch.full((4, 8, 128), float("nan"))
