"""How long vLLM takes to load a checkpoint, and how much memory at its peak.

`python benchmarks/vllm_load.py [--scheme 2x8g8]` writes a checkpoint of random codes in the shape
of Llama-3.2-1B, starts an engine on it in a process of its own, and one on a toy model in another:
the bare engine. Memory is sampled every 3 ms: "anonymous" is what the process has allocated, "all"
also counts the mapped file, which the system takes back when it needs to.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import machine
import memory
import results
import torch
from torch import Tensor

from pvrt.format.config_block import quantization_config
from pvrt.format.scheme import Scheme
from pvrt.format.write import WriteOptions, write_checkpoint

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures.published import LAYOUTS, write_published
from tests.fixtures.toy import random_layer
from tests.fixtures.vllm_generate import ENVIRONMENT

HIDDEN, INNER, LAYERS, VOCABULARY, HEADS, KV_HEADS, HEAD = 2048, 8192, 16, 128256, 32, 8, 64
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
ENGINE = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 256,
}


def tensors(scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """A model of random weights, one tensor after the other."""
    half = torch.float16
    yield "model.embed_tokens.weight", torch.randn(VOCABULARY, HIDDEN).mul_(0.02).to(half)
    for block in range(LAYERS):
        prefix = f"model.layers.{block}"
        for name, shape in LINEARS.items():
            yield from random_layer(scheme, *shape, seed=block, dtype=half).named(
                f"{prefix}.{name}"
            )
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", torch.ones(HIDDEN, dtype=half)
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=half)


def write(path: Path, scheme: Scheme) -> int:
    """Write the large checkpoint. Returns bytes of its weights."""
    config = {
        **LAYOUTS["llama-3.2"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "quantization_config": quantization_config({"model.layers": scheme}, ["lm_head"]),
    }
    write_checkpoint(path, config, tensors(scheme), WriteOptions(max_shard_bytes=256 << 20))
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def load(folder: str) -> dict[str, Any]:
    """Start an engine here, and say what it took."""
    from vllm import LLM

    before, started, watch = memory.sizes(), time.perf_counter(), memory.Watch()
    watch.start()
    llm = LLM(folder, skip_tokenizer_init=True, **ENGINE)
    seconds = time.perf_counter() - started
    watch.phase = "loaded"
    after = memory.sizes()
    del llm
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "before": before,
        "peak": watch.peak["start"],
        "after": after,
    }


def in_a_process(folder: Path) -> dict[str, Any]:
    """`load` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(folder)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def main() -> None:
    """Measure one scheme and store it beside the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="2x8g8")
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(load(arguments.child)), flush=True)
        return
    scheme = Scheme.parse(arguments.scheme)
    with TemporaryDirectory() as folder:
        write_published(Path(folder) / "toy", "llama-3.2", arguments.scheme)
        size = write(Path(folder) / "large", scheme)
        toy, large = (in_a_process(Path(folder) / name) for name in ("toy", "large"))
    ratios = {
        f"{moment}_{kind}_over_checkpoint": round(
            (large[moment][kind] - toy[moment][kind]) / size, 3
        )
        for moment in ("peak", "after")
        for kind in ("anonymous", "all")
    }
    row = {
        **machine.describe(),
        "machine_shared": True,
        "scheme": str(scheme),
        "shape": "Llama-3.2-1B",
        "checkpoint_bytes": size,
        **ratios,
        "bare_engine": toy,
        "with_checkpoint": large,
    }
    print(json.dumps(row, indent=1))
    results.store("vllm_load", results.renewed(results.load("vllm_load"), [row], "scheme"))


if __name__ == "__main__":
    main()
