"""What each part of the calibration is worth: writes results/calibration_ablation.json.

    PVRT_DATA=FOLDER .venv/bin/python benchmarks/calibration_ablation.py [variant ...]

SmolLM2-135M at 2x8g8, effort quick, one sampled calibration text for all variants. Every variant is
the whole model; perplexity is of WikiText-2 *validation* (first windows of 2048 tokens, float32),
so that nothing here is chosen on the test split. Results of variants not named are kept.
"""

import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import data
import machine
import quickstart
import results
import torch

import pvrt
from pvrt.tools.perplexity import perplexity, read_text, windows
from pvrt_tune.data import sampled
from pvrt_tune.data.source_model import load_source
from pvrt_tune.data.text import Windows
from pvrt_tune.fit import additive
from pvrt_tune.fit.additive import AdditiveFit
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import EFFORTS, FinetuneSettings, Recipe, TuneJob

WINDOWS = 8
SCHEME = "2x8g8"


class WeightSpaceStart(AdditiveFit):
    """k-means that sees the weights alone, every coordinate and row alike, as published."""

    def importance(self) -> torch.Tensor:
        """One everywhere."""
        return torch.ones(self.groups, self.g)


class AdamFit(AdditiveFit):
    """Codebooks and scales by 100 Adam steps a round (betas 0, .95, amsgrad), as published."""

    STEPS = 100

    def fit_codebooks(self) -> None:
        """Adam on both; the published rate of 1e-4 belongs to rows of norm 1, ours have RMS 1."""
        codebooks = self.codebooks.clone().requires_grad_(True)
        scales = self.scales.clone().requires_grad_(True)
        width = self.weight.shape[1] ** 0.5
        groups = [
            {"params": [codebooks], "lr": 1e-4 * width},
            {"params": [scales], "lr": 1e-4 / width},
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.0, 0.95), amsgrad=True)
        for _ in range(self.STEPS):
            value = self.unscaled(codebooks)
            error = self.weight - scales * value
            loss = ((error @ self.moment) * error).sum() / len(error)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self.codebooks, self.scales = codebooks.detach(), scales.detach()

    def fit_scales(self) -> None:
        """Part of `fit_codebooks` here."""


class NoFeedback(AdditiveFit):
    """The start's codes go straight into the sweeps."""

    def assign_with_feedback(self) -> None:
        """Keep the codes of the start."""


BASE = replace(EFFORTS["quick"], scheme=SCHEME)
VARIANTS: dict[str, tuple[type[AdditiveFit], Recipe]] = {
    "default": (AdditiveFit, BASE),
    "no block fine-tuning": (AdditiveFit, replace(BASE, finetune=FinetuneSettings(epochs=0))),
    "weight-space start": (WeightSpaceStart, BASE),
    "no error feedback": (NoFeedback, BASE),
    "Adam instead of the exact fit": (AdamFit, BASE),
    "targets of the original model": (AdditiveFit, replace(BASE, targets="original")),
}


def main() -> None:
    """Run the named variants, or all."""
    rows = results.load("calibration_ablation")
    validation = read_text(data.need(data.VALIDATION))
    model = str(quickstart.smollm2())
    source = load_source(model)
    tokens = windows(validation, source.tokenizer, 2048, WINDOWS)
    written = sampled.from_model(
        source.dense(torch.float32), Windows(BASE.samples, BASE.length, BASE.seed)
    )
    sampled.from_model = lambda *args: written
    if not rows:
        original = perplexity(source.dense(torch.float32), tokens).value
        rows = [{"variant": "original", "perplexity": original}]
    for name in sys.argv[1:] or VARIANTS:
        kind, recipe = VARIANTS[name]
        additive.AdditiveFit = kind  # type: ignore[misc]
        folder = Path(tempfile.mkdtemp())
        wall, cpu = time.monotonic(), time.process_time()
        tune(TuneJob(model, folder / "out", recipe), lambda line: print(line, flush=True))
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        manifest = json.loads((folder / "out" / "pvrt.json").read_text())
        errors = [e for block in manifest["blocks"] for e in block["errors"].values()]
        tuned = pvrt.load(folder / "out", dense=True, dtype="float32")
        row = {
            "variant": name,
            "model": "SmolLM2-135M-Instruct",
            "scheme": SCHEME,
            "effort": "quick",
            "perplexity": perplexity(tuned, tokens).value,
            "text": f"WikiText-2 validation, first {WINDOWS} windows of 2048",
            "mean_layer_error": sum(errors) / len(errors),
            "last_block_error": manifest["blocks"][-1]["output_error"]["after"],
            "seconds": wall,
            "cpu_seconds": cpu,
            **machine.describe(),
        }
        print(row, flush=True)
        rows = results.renewed(rows, [row], "variant")
        results.store("calibration_ablation", rows)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
