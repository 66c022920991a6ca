"""Relative output error and CPU seconds of single layers: writes results/calibration_layers.json.

    .venv/bin/python benchmarks/calibration_layers.py [efforts|variants|schemes|grids ...]

Four layers of SmolLM2-135M (GGUF dequantised to bfloat16), H = mean of x x^T over 32 windows of
1024 tokens of WikiText-2 validation through the original model in float32, what is stored rounded
to float16. CPU seconds are process time of the fit alone, in one thread. Rows by `part`:

    efforts    2x8g8 at every effort of `pvrt tune`, beside the public reference
    variants   2x8g8 at effort standard with one thing changed
    schemes    all other schemes at effort standard, on one layer
    grids      scalar grids beside plain rounding and plain GPTQ; groups of 64 and 128, because the
               GGUF's own grid has groups of 32 and would come out nearly lossless

Rows of parts that are not named are kept.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import calibration_variants as variants
import machine
import quickstart
import torch

from pvrt.format.scheme import GridScheme, Scheme
from pvrt.tools.perplexity import read_text, windows
from pvrt_tune.data.source_model import load_source
from pvrt_tune.fit import additive
from pvrt_tune.fit.additive import AdditiveFit, fit_layer
from pvrt_tune.fit.grid import fit_grid
from pvrt_tune.fit.objective import Objective
from pvrt_tune.settings import EFFORTS, FitSettings

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
    model.model.layers = model.model.layers[:11]  # those measured and before
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


Problem = tuple[torch.Tensor, torch.Tensor]
STANDARD = EFFORTS["standard"].fit
#: Name: how it fits, and with what settings.
VARIANTS: dict[str, tuple[type[AdditiveFit], FitSettings]] = {
    "beam 1": (AdditiveFit, replace(STANDARD, beam=1)),
    "beam 4": (AdditiveFit, replace(STANDARD, beam=4)),
    "beam 16": (AdditiveFit, replace(STANDARD, beam=16)),
    "beam 1, 20 rounds": (AdditiveFit, replace(STANDARD, beam=1, rounds=20)),
    "12 k-means iterations": (AdditiveFit, replace(STANDARD, kmeans_iterations=12)),
    "8 CG iterations": (AdditiveFit, replace(STANDARD, cg_iterations=8)),
    "no error feedback": (variants.NoFeedback, STANDARD),
    "feedback in natural order": (variants.NaturalOrder, STANDARD),
    "start weighted by diag(H)": (variants.PlainImportance, STANDARD),
    "start in weight space": (variants.WeightSpaceStart, STANDARD),
    "start in the full metric": (variants.FullMetric, STANDARD),
    "scales from output energy": (variants.ScaleOfOutputs, STANDARD),
}
SCHEMES = ("1x8g8", "1x8g4", "3x8g8", "4x8g8", "2x12g8", "1x16g8", "1x16g16")
GRIDS = ("w2g64", "w2g64s", "w3g64", "w3g64s", "w4g64", "w4g64s", "w4g128")


def fitted(
    problem: Problem, scheme: str, kind: type[AdditiveFit], settings: FitSettings
) -> dict[str, Any]:
    """Error and CPU seconds of one fit."""
    generator = torch.Generator().manual_seed(0)
    original = additive.AdditiveFit
    started = time.process_time()
    try:
        additive.AdditiveFit = kind  # type: ignore[misc]
        fit = fit_layer(*problem, Scheme.parse(scheme), settings, generator).result(torch.float16)
    finally:
        additive.AdditiveFit = original  # type: ignore[misc]
    seconds = time.process_time() - started
    return {
        "scheme": scheme,
        "relative_error": fit.relative_error,
        "cpu_seconds": seconds,
        "settings": asdict(settings),
    }


def efforts(cases: dict[str, Problem]) -> Iterator[dict[str, Any]]:
    """2x8g8 at every effort."""
    for (name, problem), (error, seconds) in zip(cases.items(), REFERENCE, strict=True):
        reference = {"reference_relative_error": error, "reference_cpu_seconds": seconds}
        for effort, recipe in EFFORTS.items():
            row = fitted(problem, "2x8g8", AdditiveFit, recipe.fit)
            yield {"layer": name, "effort": effort, **row, **reference}


def changed(cases: dict[str, Problem]) -> Iterator[dict[str, Any]]:
    """2x8g8 at effort standard with one thing changed, and unchanged for comparison."""
    for name, problem in sorted(cases.items(), key=lambda case: len(case[1][1])):
        for variant, (kind, settings) in {"standard": (AdditiveFit, STANDARD), **VARIANTS}.items():
            row = fitted(problem, "2x8g8", kind, settings)
            yield {"layer": name, "variant": variant, **row}


def schemes(cases: dict[str, Problem]) -> Iterator[dict[str, Any]]:
    """Other schemes on the layer with most groups of its size."""
    name = LAYERS[-1]
    for scheme in SCHEMES:
        yield {"layer": name, **fitted(cases[name], scheme, AdditiveFit, STANDARD)}


def grids(cases: dict[str, Problem]) -> Iterator[dict[str, Any]]:
    """Scalar grids against plain rounding and plain GPTQ."""
    for name, (weight, moment) in cases.items():
        objective = Objective(weight, moment)
        for text in GRIDS:
            scheme = GridScheme.parse(text)
            if not scheme.divides(*weight.shape):
                continue
            started = time.process_time()
            fit = fit_grid(weight, moment, scheme, STANDARD).result(torch.float16)
            seconds = time.process_time() - started
            rounded, gptq = (
                objective.relative_error(variants.plain_grid(weight, moment, scheme, feedback))
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


PARTS = {"efforts": efforts, "variants": changed, "schemes": schemes, "grids": grids}


def main() -> None:
    """Fit everything in the named parts, print as it goes and store the figures."""
    if not VALIDATION.is_file():
        sys.exit(f"{VALIDATION} is missing: this benchmark needs WikiText-2 validation text")
    stored = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    rows = {part: [row for row in stored if row.get("part") == part] for part in PARTS}
    cases = problems()
    torch.set_num_threads(1)
    place = {"shared_machine": True, **machine.describe()}
    for part in sys.argv[1:] or PARTS:
        rows[part] = []
        for row in PARTS[part](cases):
            rows[part].append({**row, "part": part, **place})
            what = row.get("effort") or row.get("variant") or ""
            print(
                f"{row['layer']:34} {row['scheme']:8} {what:26} {row['relative_error']:.5f}  "
                f"{row['cpu_seconds']:6.1f} s  {row.get('ratio_to_gptq', '')}",
                flush=True,
            )
            stored = [row for each in rows.values() for row in each]
            RESULT.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
