"""Models of known shapes with random weights, for speed only: as AQLM, dense and GGUF folders."""

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pvrt.format.aqlm import QuantizedLayer
from pvrt.format.config_block import quantization_config
from pvrt.format.scheme import Scheme
from pvrt.format.write import write_checkpoint

# hidden, intermediate, layers, heads, kv heads, vocabulary, rope theta; head size 64, tied lm_head
SHAPES = {
    "llama-1b": (2048, 8192, 16, 32, 8, 128256, 500000.0),  # Llama-3.2-1B
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 100000.0),
}


def config(shape: str) -> dict[str, Any]:
    """config.json of a shape."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, theta = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def linears(shape: str) -> Iterator[tuple[str, int, int]]:
    """(name, out, in) of every linear layer in the decoder's blocks."""
    hidden, intermediate, layers, heads, kv_heads, _, _ = SHAPES[shape]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj", heads * 64, hidden
        yield f"{at}.self_attn.k_proj", kv_heads * 64, hidden
        yield f"{at}.self_attn.v_proj", kv_heads * 64, hidden
        yield f"{at}.self_attn.o_proj", hidden, heads * 64
        yield f"{at}.mlp.gate_proj", intermediate, hidden
        yield f"{at}.mlp.up_proj", intermediate, hidden
        yield f"{at}.mlp.down_proj", hidden, intermediate


def others(shape: str) -> Iterator[tuple[str, Tensor]]:
    """Embedding and norms."""
    hidden, _, layers, _, _, vocabulary, _ = SHAPES[shape]
    yield "model.embed_tokens.weight", torch.randn(vocabulary, hidden).bfloat16() * 0.02
    yield "model.norm.weight", torch.ones(hidden).bfloat16()
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(hidden).bfloat16()


def parameters(shape: str) -> int:
    """Weights of the model, the tied lm_head counted once."""
    hidden, vocabulary = SHAPES[shape][0], SHAPES[shape][5]
    return sum(out * inputs for _, out, inputs in linears(shape)) + vocabulary * hidden


def _random(scheme: Scheme, out: int, inputs: int) -> QuantizedLayer:
    limits = torch.iinfo(scheme.code_dtype)
    codes = torch.randint(
        limits.min, limits.max + 1, scheme.codes_shape(out, inputs), dtype=scheme.code_dtype
    )
    codebooks = torch.randn(scheme.codebooks_shape).half() / scheme.num_codebooks**0.5
    return QuantizedLayer(
        codes, codebooks, torch.full(scheme.scales_shape(out), inputs**-0.5).half()
    )


def write_aqlm(folder: Path, shape: str, scheme: str) -> Path:
    """A checkpoint with random codes."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        form, names = Scheme.parse(scheme), [name for name, _, _ in linears(shape)]
        tensors = dict(others(shape))
        for name, out, inputs in linears(shape):
            tensors.update(_random(form, out, inputs).named(name))
        block = quantization_config(dict.fromkeys(names, form), ["lm_head"])
        write_checkpoint(folder, {**config(shape), "quantization_config": block}, tensors.items())
    return folder


def write_dense(folder: Path, shape: str) -> Path:
    """The same shape in bfloat16."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(others(shape))
        for name, out, inputs in linears(shape):
            tensors[f"{name}.weight"] = torch.randn(out, inputs).bfloat16() * inputs**-0.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config(shape)))
    return folder


def write_gguf(folder: Path, shape: str, format: str) -> Path:
    """The same shape for llama.cpp, quantised by llama.cpp itself; needs gguf and llama_cpp.

    Formats that need an importance matrix get one of ones.
    """
    import llama_cpp

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{shape}-{format}.gguf"
    if target.is_file():
        return target
    source = folder / f"{shape}-f16.gguf"
    if not source.is_file():
        _write_f16(source, shape)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{format.upper()}")
    settings.nthread = 2
    if format.startswith("iq2"):
        widths = {_gguf_name(name): inputs for name, _, inputs in linears(shape)}
        widths["token_embd"] = SHAPES[shape][0]
        ones = (ctypes.c_float * max(widths.values()))(*[1.0] * max(widths.values()))
        entries = [
            llama_cpp.llama_model_imatrix_data(f"{name}.weight".encode(), ones, width)
            for name, width in widths.items()
        ]
        table = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
        settings.imatrix = ctypes.cast(table, type(settings.imatrix))
    part = target.with_suffix(".part")
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(part).encode(), ctypes.byref(settings)
    )
    if failed:
        raise SystemExit(f"llama.cpp could not quantise {source} to {format}")
    part.rename(target)
    return target


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_GGUF_NAMES[part]}"


def _write_f16(path: Path, shape: str) -> None:
    import gguf

    hidden, intermediate, layers, heads, kv_heads, vocabulary, theta = SHAPES[shape]
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [b"t%d" % i for i in range(3, vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3] + [1] * (vocabulary - 3))
    for name, tensor in others(shape):
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", tensor.half().numpy())
            continue
        layer = name.removeprefix("model.layers.").split(".")[0]
        short = "attn_norm" if "input" in name else "ffn_norm"
        own = "output_norm" if name == "model.norm.weight" else f"blk.{layer}.{short}"
        writer.add_tensor(f"{own}.weight", tensor.float().numpy())
    for name, out, inputs in linears(shape):
        weight = torch.randn(out, inputs) * inputs**-0.5
        writer.add_tensor(f"{_gguf_name(name)}.weight", weight.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
