"""Every language model of transformers, from its real configuration, random and at toy size.

Settings are found by their names: what many configurations have is made small by one value. What
does not come out right so has its own settings in SPECIAL.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' fixtures

from tests.fixtures.toy import VOCABULARY, random_model

#: Small values for what configurations call by these names, where they have them.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM takes on a CPU
    "rotary_dim": 16,
    "kv_channels": 32,
    "attention_head_dim": 32,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "index_topk": 8,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "sliding_window": 16,
    "ffn_dim": 128,
    "word_embed_proj_dim": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    # Of images and sound.
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "image_size": 28,
    "patch_size": 14,
}
_LINEAR = ["linear_attention", "full_attention"]
_SLIDING = ["sliding_attention", "full_attention"]
_GEMMA4 = {
    "num_hidden_layers": 4,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 1,
    "layer_types": 2 * _SLIDING,
}
_GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
_QWEN35 = {"layer_types": _LINEAR}
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 32},
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        **{f"{part}_config": {"hidden_size": 64, "head_dim": 16, "hidden_size_global": 64,
                              "intermediate_size": 64, "num_key_value_heads": 4}
           for part in ("patcher", "encoder", "decoder", "global")},
    },
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
            for kind in _SLIDING
        },
    },
    "ctrl": {**_GPT, "dff": 128},
    "dbrx": {
        "d_model": 128, "n_heads": 4, "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2,
                       "hidden_size": 128},
    },
    "dots1": {"n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 300, "<|extra_200|>": 301}},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 1,
        "altup_num_inputs": 4, "activation_sparsity_pattern": None, "layer_types": 2 * _SLIDING,
    },
    "gemma4": {"text_config": _GEMMA4, "audio_config": None,
               "vision_config": {**_VISION, "head_dim": 16, "num_key_value_heads": 2,
                                 "position_embedding_size": 64}},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": {"layer_types": _SLIDING}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"],
                         "mamba_d_head": 32},
    "hunyuan_v1_moe": {
        "moe_topk": 2, "moe_intermediate_size": [64, 64], "num_shared_expert": [1, 1],
    },
    "inkling_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32,
        "rel_extent": 32, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"],
    },
    "jamba": {
        "num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
    "kimi_linear": {"layer_types": _LINEAR, "linear_head_dim": 32, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2, "ffn_hidden_size": 128, "head_dim": 32, "moe_topk": 2,
        "zero_expert_num": 2, "expert_ffn_hidden_size": 64, "num_key_value_heads": 4,
    },
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
    "minimax": {"layer_types": _LINEAR},
    "minimax_m3_vl_text": {"dense_intermediate_size": 128, "index_block_size": 8},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {**_VISION, "num_global_layers": 1, "attention_heads": 2,
                          "intermediate_layers_indices": [0], "vision_output_dim": 64},
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 32,
        "n_groups": 1, "chunk_size": 16, "moe_shared_expert_intermediate_size": 64,
    },
    "phi4_multimodal": {
        "vision_config": {**_VISION, "crop_size": 28},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 2,
                         "num_attention_heads": 2, "nemo_conv_channels": 32},
    },
    "qwen3_5": {"text_config": _QWEN35},
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe": {"text_config": _QWEN35},
    "qwen3_5_moe_text": _QWEN35,
    "qwen3_next": {"layer_types": _LINEAR},
    "recurrent_gemma": {
        "num_hidden_layers": 3, "lru_width": 128, "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 128},
    "smollm3": {"no_rope_layers": [1, 0]},
    "zamba": {
        "num_hidden_layers": 4, "attention_hidden_size": 256, "attention_head_dim": 64,
        "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 6, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16,
        "hybrid_layer_ids": [2, 4], "num_mem_blocks": 1, "adapter_rank": 8,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}  # fmt: skip

#: Encoders, decoders of encoders, and drafts that read another model's states, which transformers
#: lists as causal language models as well.
NO_DECODERS = frozenset({
    "gemma4_assistant", "gemma4_unified_assistant", "bart", "bert", "bert-generation", "big_bird",
    "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert", "cpmant", "data2vec-text",
    "electra", "ernie", "marian", "mbart", "megatron-bert", "moshi", "musicgen",
    "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod",
})  # fmt: skip


def architectures() -> list[str]:
    """Model types of all decoders that transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NO_DECODERS]


def small_config(name: str) -> Any:
    """The configuration of an architecture at toy size."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    usual, special = CONFIG_MAPPING[name](), SPECIAL.get(name, {})
    settings = {**_small(usual), **special}
    for part in usual.sub_configs:
        inner = getattr(usual, part, None)
        if inner is not None and special.get(part, {}) is not None and hasattr(inner, "to_dict"):
            settings[part] = {**_small(inner), **special.get(part, {})}
    config = AutoConfig.for_model(name, **settings)
    # As published: a model that reads images is not stored as its text part.
    whole = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    config.architectures = None if whole is None else [whole.__name__]
    return config


def _small(usual: Any) -> dict[str, Any]:
    """Small values of what a configuration has."""
    known = {**usual.to_dict(), **usual.attribute_map}
    small = {key: value for key, value in SMALL.items() if key in known}
    if "kv_lora_rank" in known:  # of which all heads are made
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def small_model(name: str) -> Any:
    """A random model of an architecture, which runs."""
    model = random_model(small_config(name))
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), use_cache=False)
    return model
