"""Arithmetic of serving: the key-value cache by layers, and the longest context in a memory."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from pvrt.kv_cache import cache_name, cache_shape
from tests.fixtures.toy import toy_model


def test_grouped_heads_keep_the_published_cache() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
    )  # fmt: skip
    cache = cache_shape(config)
    assert cache.bytes_for(1) == 2 * 32 * 8 * 128 * 2  # Llama 3.1 8B: 128 KiB per token
    assert cache.longest_context(10 * cache.bytes_for(1)) == 10
    assert cache.longest_context(cache.bytes_for(1) - 1) == 0
    assert cache.longest_context(1e15) == 131072


def test_a_sliding_window_stops_growing() -> None:
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=6, num_key_value_heads=1, head_dim=64, sliding_window=16
    )
    cache = cache_shape(config)
    per_layer = 2 * 64 * 2
    assert cache.bytes_for(8) == 6 * 8 * per_layer
    sliding = sum("sliding" in kind for kind in config.layer_types)
    assert 0 < sliding < 6
    assert cache.bytes_for(100) == (sliding * 16 + (6 - sliding) * 100) * per_layer


@pytest.mark.parametrize("context", [1, 17, 400])
def test_the_longest_context_is_the_last_that_fits(context: int) -> None:
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, sliding_window=32)
    cache = cache_shape(config)
    room = cache.bytes_for(context)
    assert cache.longest_context(room) == context
    assert cache.longest_context(room - 1) == context - 1


@pytest.mark.filterwarnings("error::FutureWarning")
def test_models_take_and_give_caches_by_the_name_that_transformers_has() -> None:
    model = toy_model("llama")
    cache = DynamicCache(config=model.config)
    output = model(torch.tensor([[1, 2, 3]]), use_cache=True, **{cache_name(): cache})
    assert output[cache_name()] is cache
    assert cache.get_seq_length() == 3


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("stated", "rope", "longest"),
    [
        (512, {"rope_type": "default"}, 512),
        (512, YARN, 2048),
        (640, YARN, 2048),  # Qwen3 states more than it was trained for
        (2048, YARN, 2048),  # others state what the scaling makes of it
        (512, {"rope_type": "yarn", "factor": 4.0}, 2048),
        (512, {"rope_type": "linear", "factor": 2.0}, 1024),
        (512, {"rope_type": "dynamic", "factor": 3.0}, 1536),
        (2048, {**YARN, "rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}, 2048),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_the_longest_context_counts_the_scaling_of_rotations(
    stated: int, rope: dict[str, Any], longest: int, old: bool
) -> None:
    spelled = {"rope_scaling": rope} if old else {"rope_parameters": {"rope_theta": 1e4, **rope}}
    config = AutoConfig.for_model("qwen3", max_position_embeddings=stated, **spelled)
    assert cache_shape(config).longest == longest
