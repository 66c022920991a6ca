"""What an hour of tuning gives, stage by stage; writes results/quality.json.

    PVRT_DATA=FOLDER python benchmarks/quality.py run quick          # tune, then measure
    PVRT_DATA=FOLDER python benchmarks/quality.py run standard
    PVRT_DATA=FOLDER python benchmarks/quality.py measure standard calibrated OUT --cpu-seconds 1700

`run` tunes SmolLM2-135M on web text by a preset (WORK/PRESET is kept, and goes on where it was
stopped) and measures the checkpoint. `measure` takes a checkpoint that is there already.

heldout_kl is the KL to the original on WikiText-2's validation file: settings are chosen by it.
wikitext2_ppl (test) and c4_ppl are only reported. All are means over all tokens of each text's
first windows of 512.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import data
import machine
import pareto_evaluate as protocol
import quickstart
import results
import torch

import pvrt
from pvrt.tools.perplexity import windows
from pvrt_tune.data.source_model import load_source

LENGTH, WINDOWS = 512, 16
PRESETS = {
    "quick": ("--effort", "quick", "--no-pv"),
    "standard": ("--effort", "standard"),
}
KEY = ("model", "scheme", "recipe", "stage", "seed")
COMMAND = [sys.executable, "-m", "pvrt", "tune"]


@torch.inference_mode()
def measured(folder: Path) -> dict[str, float]:
    """KL and perplexities of a checkpoint."""
    source = load_source(str(quickstart.smollm2()))
    original = source.dense(torch.float32)
    model = pvrt.load(folder, dense=True, dtype=torch.float32)
    settings = protocol.Settings(window=LENGTH, windows=WINDOWS)
    chosen_by = data.need(data.VALIDATION).read_text(encoding="utf-8")
    texts = {"validation": windows(chosen_by, source.tokenizer, LENGTH, WINDOWS)}
    texts |= {part: protocol.tokens(part, source.tokenizer, settings) for part in protocol.TEXTS}
    found = {}
    for part, ids in texts.items():
        states = torch.cat([protocol.hidden(original, row[None]) for row in ids])
        head = original.get_output_embeddings().weight
        ours, theirs = (protocol.text(each, ids, states, head) for each in (model, None))
        if part == "validation":
            found["heldout_kl"] = ours["kl"]
        else:
            found |= {f"{part}_ppl": ours["ppl"], f"original_{part}_ppl": theirs["ppl"]}
    return {name: round(value, 4) for name, value in found.items()}


def row(recipe: str, stage: str, folder: Path, cpu_seconds: float) -> dict[str, Any]:
    """A row of the table, with what the checkpoint says of itself."""
    manifest = json.loads((folder / "pvrt.json").read_text(encoding="utf-8"))
    asked, steps = manifest["recipe"], manifest.get("pv", {}).get("step", 0)
    tokens = asked["samples"] * asked["length"]
    if steps:
        tokens += steps * asked["training"]["batch"] * asked["length"]
    return {
        "model": "smollm2-135m",
        "scheme": manifest["scheme"],
        "recipe": recipe,
        "stage": stage,
        "cpu_seconds": round(cpu_seconds),
        "tokens": tokens,
        **measured(folder),
        "seed": asked["seed"],
        **machine.describe(),
    }


def run(preset: str, work: Path) -> Path:
    """Tune by a preset, and note the CPU seconds of all tries."""
    out, noted = work / preset, work / f"{preset}.seconds"
    before = machine.cpu_seconds()
    text = ("--data", data.need(data.WEB), "--no-report")
    command = [*COMMAND, quickstart.smollm2(), "-o", out, *text, *PRESETS[preset]]
    work.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run([str(part) for part in command], check=True)
    finally:
        spent = float(noted.read_text()) if noted.exists() else 0.0
        noted.write_text(str(spent + machine.cpu_seconds() - before))
    return out


def main() -> None:
    """Tune and measure, or measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "measure"))
    parser.add_argument("recipe")
    parser.add_argument("stage", nargs="?", default="done")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--cpu-seconds", type=float)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quality")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder, seconds = options.folder, options.cpu_seconds
    if options.what == "run":
        folder = run(options.recipe, options.work)
        seconds = float((options.work / f"{options.recipe}.seconds").read_text())
    if folder is None or seconds is None:
        parser.error("measure wants a folder and --cpu-seconds")
    fresh = row(options.recipe, options.stage, folder, seconds)
    print(json.dumps(fresh), flush=True)
    results.store("quality", results.renewed(results.load("quality"), [fresh], *KEY))


if __name__ == "__main__":
    main()
