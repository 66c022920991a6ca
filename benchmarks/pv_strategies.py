"""The strategies of PV-Tuning on a real model: writes results/pv_strategies.json.

    .venv/bin/python benchmarks/pv_strategies.py [--schemes 2x8g8 1x8g8 ...] [--strategies ...]

SmolLM2-135M, calibrated once per scheme, then tuned by every strategy from there: the same data,
steps and learning rates per scheme, seeds 0 to 2 (which order the windows and draw codes). Text:
Wikipedia, web and WikiText-2 train, 256 tokens a window; the best state is chosen on held-out
windows of that text. Perplexity is of the first windows of WikiText-2 test and of C4 documents that
nothing was trained on, for the report alone. Rows that are there already are kept, so the table can
grow over several runs.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import quickstart
import torch
from torch import Tensor

from pvrt.evaluate import perplexity, read_text, windows
from pvrt.linear import decode_once
from pvrt.scheme import GridScheme, parse_scheme
from pvrt_tune.blocks import find_blocks
from pvrt_tune.calibration import documents, from_text
from pvrt_tune.pv import STRATEGIES
from pvrt_tune.pvstage import calibrated, pv_tune, tuned_tensors
from pvrt_tune.recipe import EFFORTS, TuneJob
from pvrt_tune.runstate import RunState
from pvrt_tune.source import Source, load_source
from pvrt_tune.training import TrainSettings
from pvrt_tune.walk import walk

DATA = machine.ROOT.parent / "shared" / "data"
RESULT = machine.ROOT / "benchmarks" / "results" / "pv_strategies.json"
TRAINING = (
    "text/wikipedia.jsonl",
    "text/openwebtext.jsonl",
    "wikitext2/wiki.train.first1MB.noblank.txt",
)
LENGTH, EVALUATED = 256, 4


def training_text(folder: Path) -> Path:
    """A folder with the training documents; C4 stays out."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for name in TRAINING:
        shutil.copy(DATA / name, text)
    return text


def second_text() -> str:
    """C4 documents, joined by blank lines."""
    rows = documents(str(DATA / "text" / "c4.jsonl"))
    return "\n\n".join(row for row in rows if isinstance(row, str))


class Bench:
    """One scheme: its calibrated blocks, and the rows that start from them."""

    def __init__(self, source: Source, scheme: str, settings: TrainSettings, folder: Path) -> None:
        self.source, self.scheme, self.settings = source, scheme, settings
        self.folder = folder / scheme
        recipe = replace(EFFORTS["quick"], scheme=scheme, length=LENGTH, pv=settings)
        self.job = TuneJob(source.name, self.folder, recipe)
        self.blocks = find_blocks(source.model)
        text = str(training_text(folder))
        self.data = from_text(text, source.tokenizer, recipe.windows, LENGTH, recipe.seed)
        self.state = RunState(self.folder / ".run")
        walk(self.job, source, self.blocks, self.data[recipe.calibration], self.state, say)

    def run(self, strategy: str, seed: int) -> dict[str, Any]:
        """Tune from the calibrated blocks and measure the best state."""
        copy = Path(tempfile.mkdtemp(dir=self.folder.parent))
        shutil.copytree(self.folder / ".run", copy / ".run")
        settings = replace(self.settings, pv=replace(self.settings.pv, strategy=strategy))
        recipe = replace(self.job.recipe, pv=settings, seed=seed)
        job, state = replace(self.job, recipe=recipe), RunState(copy / ".run")
        held = settings.held_out
        order = torch.randperm(len(self.data) - held, generator=torch.manual_seed(seed))
        data = self.data[[*range(held), *(order + held).tolist()]]
        started = time.monotonic()
        pv_tune(job, self.source, self.blocks, data, state, say, None)
        seconds = time.monotonic() - started
        tensors, report = tuned_tensors(state)
        row = {
            "strategy": strategy,
            "seed": seed,
            "steps": settings.steps,
            "tokens": settings.steps * settings.batch * LENGTH,
            "heldout_kl": report["held_out_kl"],
            "best_step": report["step"],
            "curves": report["curves"],
            "seconds": seconds,
            **self.quality(state, tensors),
        }
        shutil.rmtree(copy)
        return row

    def quality(self, state: RunState, tensors: dict[str, Tensor]) -> dict[str, float]:
        """Perplexities of the calibrated model with some of its tensors replaced."""
        model = calibrated(self.job, self.source, self.blocks, state)
        with torch.no_grad():
            for name, tensor in tensors.items():
                model.get_parameter(name).copy_(tensor)
        decode_once(model)
        return evaluated(model, self.source)


def evaluated(model: Any, source: Source) -> dict[str, float]:
    """WikiText-2 test and C4 perplexity over the first windows of 2048 tokens."""
    texts = {"wikitext2_ppl": read_text(quickstart.WIKITEXT), "second_ppl": second_text()}
    return {
        name: perplexity(model, windows(text, source.tokenizer, 2048, EVALUATED)).value
        for name, text in texts.items()
    }


def code_bits(name: str) -> float:
    """Bits of codes per weight; codebooks and scales come on top."""
    scheme = parse_scheme(name)
    if isinstance(scheme, GridScheme):
        return scheme.bits
    return scheme.num_codebooks * scheme.nbits_per_codebook / scheme.in_group_size


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def main() -> None:
    """Fill in the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schemes", nargs="+", default=["2x8g8", "1x8g8", "w2g64"])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "pv-strategies"
    )
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"{DATA} is missing: this benchmark needs its text")
    rows = json.loads(RESULT.read_text()) if RESULT.is_file() else []

    def add(**row: Any) -> None:
        rows.append({**row, **machine.describe()})
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")
        say(str({k: v for k, v in row.items() if k != "curves"}))

    def missing(**key: Any) -> bool:
        return not any(all(row.get(k) == v for k, v in key.items()) for row in rows)

    options.folder.mkdir(parents=True, exist_ok=True)
    source = load_source(str(quickstart.smollm2()))
    if missing(strategy="original"):
        model = source.dense(torch.float32)
        add(representation="float", bits=16, strategy="original", **evaluated(model, source))
    settings = TrainSettings(windows=4 * options.steps, steps=options.steps, batch=4, patience=99)
    for scheme in options.schemes:
        bench = Bench(source, scheme, settings, options.folder)
        kind = {"representation": scheme, "bits": code_bits(scheme)}
        if missing(representation=scheme, strategy="calibration only"):
            add(**kind, strategy="calibration only", **bench.quality(bench.state, {}))
        for seed in options.seeds:
            for strategy in options.strategies:
                if missing(representation=scheme, strategy=strategy, seed=seed):
                    add(**kind, **bench.run(strategy, seed))


if __name__ == "__main__":
    main()
