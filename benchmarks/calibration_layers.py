"""Relative output error and CPU seconds of single layers: writes results/calibration_layers.json.

    PVRT_DATA=FOLDER .venv/bin/python benchmarks/calibration_layers.py [efforts|grids ...]

Four layers of SmolLM2-135M (GGUF dequantised to bfloat16), H = mean of x x^T over 32 windows of
1024 tokens of WikiText-2 validation through the original model in float32, what is stored rounded
to float16. CPU seconds are process time of the fit alone, in one thread. Rows by `part`:

    efforts    2x8g8 at every effort of `pvrt tune`, beside the public reference
    grids      scalar grids beside plain rounding and plain GPTQ; groups of 64 and 128, because the
               GGUF's own grid has groups of 32 and would come out nearly lossless

Rows of parts that are not named are kept.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any

import data
import machine
import quickstart
import results
import torch
from torch import Tensor

from pvrt.format.scheme import GridScheme, Scheme
from pvrt.tools.perplexity import read_text, windows
from pvrt_tune.data.source_model import load_source
from pvrt_tune.fit.additive import fit_layer
from pvrt_tune.fit.grid import fit_grid
from pvrt_tune.fit.objective import Objective
from pvrt_tune.settings import EFFORTS

sys.path.insert(0, str(machine.ROOT))
from tests.fixtures.plain_grid import plain_grid

LAYERS = (
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers.10.mlp.up_proj",
)
# The public reference with the defaults of its README, on the same layers: error, CPU seconds.
# Measured once on another machine of two cores, so only errors compare exactly.
REFERENCE = ((0.01026, 131), (0.01548, 105), (0.04021, 482), (0.05170, 249))
GRIDS = ("w2g64", "w2g64s", "w3g64", "w3g64s", "w4g64", "w4g64s", "w4g128")
Problem = tuple[Tensor, Tensor]


def problems() -> dict[str, Problem]:
    """(W, H) of every layer."""
    source = load_source(str(quickstart.smollm2()))
    tokens = windows(read_text(data.need(data.VALIDATION)), source.tokenizer, 1024, 32)
    model = source.dense(torch.float32)
    model.model.layers = model.model.layers[:11]  # those measured and before
    sums: dict[str, Tensor] = {}

    def hook(args: tuple[Tensor, ...], name: str) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        sums[name] = sums.get(name, torch.zeros(1)) + x.T @ x

    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: hook(args, name)
        )
    with torch.inference_mode():
        for part in torch.split(tokens, 2):
            model.model(part, use_cache=False)
    count = tokens.numel()
    return {
        name: (model.get_submodule(name).weight.detach(), (sums[name] / count).clone())
        for name in LAYERS
    }


def efforts(cases: dict[str, Problem]) -> Iterator[dict[str, Any]]:
    """2x8g8 at every effort."""
    for (name, problem), (error, seconds) in zip(cases.items(), REFERENCE, strict=True):
        for effort, recipe in EFFORTS.items():
            generator = torch.Generator().manual_seed(0)
            started = time.process_time()
            parsed = Scheme.parse("2x8g8")
            fit = fit_layer(*problem, parsed, recipe.fit, generator).result(torch.float16)
            yield {
                "layer": name,
                "effort": effort,
                "scheme": "2x8g8",
                "relative_error": fit.relative_error,
                "cpu_seconds": time.process_time() - started,
                "reference_relative_error": error,
                "reference_cpu_seconds": seconds,
            }


def grids(cases: dict[str, Problem]) -> Iterator[dict[str, Any]]:
    """Scalar grids against plain rounding and plain GPTQ."""
    for name, (weight, moment) in cases.items():
        objective = Objective(weight, moment)
        for text in GRIDS:
            scheme = GridScheme.parse(text)
            if not scheme.divides(*weight.shape):
                continue
            started = time.process_time()
            fit = fit_grid(weight, moment, scheme, EFFORTS["standard"].fit).result(torch.float16)
            seconds = time.process_time() - started
            rounded, gptq = (
                objective.relative_error(plain_grid(weight, moment, scheme, feedback=feedback))
                for feedback in (False, True)
            )
            yield {
                "layer": name,
                "scheme": text,
                "relative_error": fit.relative_error,
                "cpu_seconds": seconds,
                "rounding_relative_error": rounded,
                "gptq_relative_error": gptq,
                "ratio_to_gptq": fit.relative_error / gptq,
            }


PARTS = {"efforts": efforts, "grids": grids}


def main() -> None:
    """Fit everything in the named parts, print as it goes and store the figures."""
    cases = problems()
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        rows = [row for row in results.load("calibration_layers") if row["part"] != part]
        for row in PARTS[part](cases):
            rows.append({**row, "part": part, "shared_machine": True, **machine.describe()})
            print(row, flush=True)
            results.store("calibration_layers", rows)


if __name__ == "__main__":
    main()
