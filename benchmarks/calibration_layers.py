"""Relative output error and CPU seconds of single layers: writes results/calibration_layers.json.

    .venv/bin/python benchmarks/calibration_layers.py

Four layers of SmolLM2-135M (GGUF dequantised to bfloat16), 2x8g8, H = mean of x x^T over 32 windows
of 1024 tokens of WikiText-2 validation through the original model in float32, codebooks and scales
stored in float16. CPU seconds are process time of the fit alone, in one thread.
"""

import json
import sys
import time
from dataclasses import asdict
from typing import Any

import machine
import quickstart
import torch

from pvrt.evaluate import read_text, windows
from pvrt.scheme import Scheme
from pvrt_tune.additive import fit_layer
from pvrt_tune.recipe import EFFORTS
from pvrt_tune.source import load_source

RESULT = machine.ROOT / "benchmarks" / "results" / "calibration_layers.json"
VALIDATION = quickstart.WIKITEXT.with_name("wiki.valid.raw")
LAYERS = (
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers.10.mlp.up_proj",
)
# The public reference with the defaults of its README, on the same layers: error, CPU seconds.
# Measured once on another machine of two cores, so only errors compare exactly.
REFERENCE = ((0.01026, 131), (0.01548, 105), (0.04021, 482), (0.05170, 249))


def problems() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(W, H) of every layer."""
    source = load_source(str(quickstart.smollm2()))
    model = source.dense(torch.float32)
    tokens = windows(read_text(VALIDATION), source.tokenizer, 1024, 32)
    sums: dict[str, torch.Tensor] = {}

    def hook(module: Any, args: tuple[torch.Tensor, ...], name: str) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        sums[name] = sums.get(name, torch.zeros(1)) + x.T @ x

    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: hook(module, args, name)
        )
    with torch.inference_mode():
        for part in torch.split(tokens, 2):
            model.model(part, use_cache=False)
    count = tokens.numel()
    return {
        name: (model.get_submodule(name).weight.detach(), (sums[name] / count).clone())
        for name in LAYERS
    }


def main() -> None:
    """Fit every layer at every effort, print a table and store the figures."""
    if not VALIDATION.is_file():
        sys.exit(f"{VALIDATION} is missing: this benchmark needs WikiText-2 validation text")
    cases = problems()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    place = machine.describe()
    for (name, (weight, moment)), (error, seconds) in zip(cases.items(), REFERENCE, strict=True):
        for effort, recipe in EFFORTS.items():
            generator = torch.Generator().manual_seed(0)
            started = time.process_time()
            fit = fit_layer(
                weight, moment, Scheme.parse("2x8g8"), recipe.fit, generator, torch.float16
            )
            rows.append(
                {
                    "layer": name,
                    "scheme": "2x8g8",
                    "effort": effort,
                    "relative_error": fit.relative_error,
                    "cpu_seconds": time.process_time() - started,
                    "reference_relative_error": error,
                    "reference_cpu_seconds": seconds,
                    "settings": asdict(recipe.fit),
                    **place,
                }
            )
            print(
                f"{name:34} {effort:7} {fit.relative_error:.5f} (reference {error:.5f})  "
                f"{rows[-1]['cpu_seconds']:6.1f} s (reference {seconds} s)",
                flush=True,
            )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
