"""Models that read images: the text part is tuned, the whole model is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

import pvrt
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.on_machine import plan_here
from pvrt_tune.settings import TuneJob
from tests.fixtures.decoders import COMMON
from tests.fixtures.toy import random_model, toy_tokenizer
from tests.tune.test_pipeline import QUICK

# Where text ends is the whole model's to say.
TEXT = {
    name: value for name, value in COMMON.items() if name not in ("bos_token_id", "eos_token_id")
}
# Wider than the text part: the blocks to tune are not simply the largest list.
VISION: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN: dict[str, Any] = {
    "depth": 2, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 64,
    "num_position_embeddings": 16, "patch_size": 14, "deepstack_visual_indexes": [0],
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION},
    "qwen3_vl": {"text_config": TEXT, "vision_config": QWEN},
    "qwen3_5": {"text_config": {**TEXT, **LINEAR}, "vision_config": QWEN},
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", "head_dim": 24, **VISION},
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
}
TOKENS = torch.arange(24)[None] % 200


def original(folder: Path, name: str) -> Any:
    """Write a model of a published class, with what lies beside it."""
    from transformers import AutoModelForImageTextToText

    config = AutoConfig.for_model(name, **MODELS[name])
    config.architectures = [AutoModelForImageTextToText._model_mapping[type(config)].__name__]
    model = random_model(config)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    for file in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (folder / file).write_text('{"a": 1}')
    return model


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return set(stored.keys())


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_is_kept(tmp_path: Path, name: str) -> None:
    model = original(tmp_path / "dense", name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    recipe = replace(QUICK, embeddings="keep", training=None)
    job = TuneJob(
        str(tmp_path / "dense"), tmp_path / "out", recipe, str(tmp_path / "text.txt"), "cpu"
    )
    plan_here(job)
    checkpoint = tune(job, lambda line: None)
    # Names are the published ones, all of them; what is in codes is of the text part.
    stored = keys(tmp_path / "out")
    dense = {key for key in stored if key.rpartition(".")[0] not in checkpoint.layers}
    assert dense | {f"{layer}.weight" for layer in checkpoint.layers} == keys(tmp_path / "dense")
    assert len(checkpoint.layers) >= 14
    assert not any("vis" in layer or "projector" in layer for layer in checkpoint.layers)
    for file in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        assert (tmp_path / "out" / file).read_text() == '{"a": 1}'
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]

    loaded = pvrt.load(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is type(model)
    own = dict(loaded.named_parameters())
    seen = {key: p for key, p in model.named_parameters() if "vis" in key or "projector" in key}
    assert seen and all(torch.equal(own[key], tensor) for key, tensor in seen.items())
    with torch.inference_mode():
        found = loaded(TOKENS).logits
        decoded = pvrt.load(tmp_path / "out", dtype=torch.float32, dense=True)(TOKENS).logits
    torch.testing.assert_close(found, decoded)
