"""The strategies of PV-Tuning on real models: writes results/pv_strategies.json.

    .venv/bin/python benchmarks/pv_strategies.py [MODEL ...] [--schemes ...] [--strategies ...]
    .venv/bin/python benchmarks/pv_strategies.py smollm2-135m --hour    # row "run": "hour"

PVRT_DATA names the folder of the text and of stories260k (data.py).

Calibrated once per scheme, then tuned by every strategy from there: the same data and steps, seeds
0 to 2 (which order the windows and draw codes). The best state is chosen on held-out windows.

stories260k, whose weights nobody quantised before, so small that 200 steps of 2048 tokens take
minutes: it trains on its own text and holds out TinyStories. smollm2-135m trains on Wikipedia, web
pages and WikiText-2 train, 256 tokens a window. Perplexity is of text that nothing was trained or
chosen on, for the report alone: later TinyStories; the first windows of WikiText-2 test and of C4.
Rows that are there already are kept, so the table can grow over several runs.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import data
import machine
import quickstart
import results
import torch
from torch import Tensor

from pvrt.format.scheme import GridScheme, parse_scheme
from pvrt.modules.whole_model import decode_once
from pvrt.tools.perplexity import perplexity, read_text, windows
from pvrt_tune.calibrate.stage import calibrate
from pvrt_tune.data.documents import documents
from pvrt_tune.data.sampled import from_model
from pvrt_tune.data.source_model import Source, load_source
from pvrt_tune.data.text import CalibrationData, Windows, from_text
from pvrt_tune.distil.stage import calibrated, pv_tune, tuned_tensors
from pvrt_tune.distil.trainer import STATE
from pvrt_tune.model_blocks import find_blocks
from pvrt_tune.pv.optimizer import STRATEGIES
from pvrt_tune.run import Run
from pvrt_tune.settings import EFFORTS, PVSettings, Recipe, StrategyName, TrainSettings, TuneJob
from pvrt_tune.store import Store

#: Where runs are kept unless a folder is given.
FOLDER = Path(tempfile.gettempdir()) / "pv-strategies"

#: Learning rates of codes by strategy where they are not the default: each the best of a few on
#: held-out text, stories260k with seed 0.
RATES = {"linearized": 5e-2, "stochastic": 3e-4, "subspace": 1e-1}


@dataclass(frozen=True)
class Subject:
    """A model, its schemes and training, and the text to train on and to measure with.

    data(source, settings, folder): held-out windows first. texts: what perplexity is measured on,
    over the first `evaluated` windows of `window` tokens each.
    """

    source: Callable[[], Path]
    schemes: tuple[str, ...]
    recipe: Recipe
    data: Callable[[Source, Recipe, Path], CalibrationData]
    texts: Callable[[], dict[str, str]]
    window: int
    evaluated: int
    hour: Recipe | None = None  #: of one run that takes an hour on 2 cores

    def recipe_of(self, strategy: StrategyName) -> Recipe:
        """Of a run by one strategy."""
        rate = RATES.get(strategy, self.recipe.pv.code_learning_rate)
        pv = replace(self.recipe.pv, strategy=strategy, code_learning_rate=rate)
        return replace(self.recipe, pv=pv)

    def evaluate(self, model: Any, source: Source) -> dict[str, float]:
        """Perplexity over the first windows of every text."""
        return {
            name: perplexity(
                model, windows(text, source.tokenizer, self.window, self.evaluated)
            ).value
            for name, text in self.texts().items()
        }


def web_text(source: Source, recipe: Recipe, folder: Path) -> CalibrationData:
    """Windows of Wikipedia, web pages and WikiText-2 train; C4 stays out."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for name in (data.WIKIPEDIA, data.WEB, data.TRAIN):
        shutil.copy(data.need(name), text)
    wanted = Windows(recipe.windows, recipe.length, recipe.seed)
    return from_text(str(text), source.tokenizer, wanted)


def own_stories(source: Source, recipe: Recipe, folder: Path) -> CalibrationData:
    """Held-out windows of TinyStories, then the model's own text."""
    assert recipe.training is not None
    file = folder / "stories.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(tinystories()[0], encoding="utf-8")
    held_out = recipe.training.held_out
    first = Windows(held_out, recipe.length, recipe.seed)
    real = from_text(str(file), source.tokenizer, first)
    model = source.dense(torch.float32)
    own = from_model(model, replace(first, count=recipe.windows - held_out))
    return replace(own, tokens=torch.cat([real.tokens, own.tokens]), positions=None)


def tinystories() -> tuple[str, str]:
    """Two halves of the stories at hand: to choose states by, and to report."""
    text = data.need(data.TINYSTORIES).read_text(encoding="utf-8")
    middle = text.index("\n\n", len(text) // 2)
    return text[:middle], text[middle:]


def c4() -> str:
    """C4 documents, joined by blank lines."""
    rows = documents(str(data.need(data.C4)))
    return "\n\n".join(row for row in rows if isinstance(row, str))


SUBJECTS = {
    "stories260k": Subject(
        source=lambda: data.need(data.STORIES260K),
        schemes=("2x4g4",),
        recipe=Recipe(
            length=128,
            training=TrainSettings(
                windows=2048,
                steps=200,
                batch=16,
                microbatch=16,
                held_out=64,
                evaluate_every=10,
                patience=99,
            ),
            pv=PVSettings(learning_rate=5e-3),
        ),
        data=own_stories,
        texts=lambda: {"tinystories_ppl": tinystories()[1]},
        window=256,
        evaluated=128,
    ),
    "smollm2-135m": Subject(
        source=quickstart.smollm2,
        schemes=("2x8g8", "1x8g8", "w2g64"),
        recipe=replace(
            EFFORTS["quick"],
            length=256,
            training=TrainSettings(windows=1600, steps=40, batch=2, microbatch=2, patience=99),
        ),
        data=web_text,
        texts=lambda: {"wikitext2_ppl": read_text(data.need(data.TEST)), "second_ppl": c4()},
        window=2048,
        evaluated=4,
        hour=Recipe(
            length=512,
            training=TrainSettings(
                windows=600,
                steps=600,
                batch=1,
                microbatch=1,
                evaluate_every=60,
                patience=99,
            ),
            pv=PVSettings(code_learning_rate=8e-3, gain_pool=8),
        ),
    ),
}


class Bench:
    """One model in one scheme: its calibrated blocks, and the rows that start from them."""

    def __init__(self, name: str, subject: Subject, source: Source, scheme: str, folder: Path):
        self.subject, self.source, self.scheme = subject, source, scheme
        self.folder = folder / f"{name}-{scheme}"
        self.job = TuneJob(source.name, self.folder, replace(subject.recipe, scheme=scheme))
        self.blocks = find_blocks(source.model)
        self.data = subject.data(source, self.job.recipe, folder / name)
        store = Store(self.folder / ".run")
        self.calibrated = Run(self.job, source, self.blocks, self.data, store, say)
        calibrate(self.calibrated)

    def run(self, strategy: StrategyName, seed: int) -> dict[str, Any]:
        """Tune from the calibrated blocks and measure the best state."""
        return self._tune(self.subject.recipe_of(strategy), self.data, seed)

    def hour(self) -> dict[str, Any]:
        """The default strategy for an hour."""
        assert self.subject.hour is not None
        text = self.folder.parent / "hour"
        data = self.subject.data(self.source, self.subject.hour, text)
        return {"run": "hour", **self._tune(self.subject.hour, data, 0)}

    def _tune(self, wanted: Recipe, data: CalibrationData, seed: int) -> dict[str, Any]:
        """A row. Its run folder stays until it is measured, so that it can be resumed; what the
        original model says of a seed's windows serves every strategy.
        """
        length = data.tokens.shape[1]
        folder = self.folder.parent / f"{self.folder.name}-{length}-{seed}"
        if not folder.is_dir():
            shutil.copytree(self.folder / ".run", folder / ".run")
        store = Store(folder / ".run")
        settings = wanted.training
        assert settings is not None
        recipe = replace(self.job.recipe, training=settings, pv=wanted.pv, seed=seed)
        held = settings.held_out
        order = torch.randperm(len(data) - held, generator=torch.manual_seed(seed))
        data = data[[*range(held), *(order + held).tolist()]]
        started, spent = time.monotonic(), time.process_time()
        job = replace(self.job, recipe=recipe)
        run = replace(self.calibrated, settings=job, data=data, store=store)
        pv_tune(run, None)
        seconds, spent = time.monotonic() - started, time.process_time() - spent
        tensors, report = tuned_tensors(store)
        row = {
            "strategy": recipe.pv.strategy,
            "seed": seed,
            "steps": settings.steps,
            "tokens": settings.steps * settings.batch * length,
            "code_learning_rate": recipe.pv.code_learning_rate,
            "heldout_kl": report["held_out_kl"],
            "best_step": report["step"],
            "curves": (store.report(store.names(STATE)[-1]) or report)["curves"],
            "seconds": seconds,
            "cpu_seconds": spent,
            **self.quality(run, tensors),
        }
        for piece in (store.folder / "pieces").glob("pv-*"):
            piece.unlink()
        return row

    def quality(self, run: Run, tensors: dict[str, Tensor]) -> dict[str, float]:
        """Perplexities of the calibrated model with some of its tensors replaced."""
        model = calibrated(run)
        with torch.no_grad():
            for name, tensor in tensors.items():
                model.get_parameter(name).copy_(tensor)
        decode_once(model)
        return self.subject.evaluate(model, self.source)


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
    parser.add_argument("models", nargs="*", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--schemes", nargs="+", help="all that the table has of a model")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--hour", action="store_true", help="the first scheme's hour, nothing else")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    rows = results.load("pv_strategies")

    def add(**row: Any) -> None:
        rows.append({**row, **machine.describe()})
        results.store("pv_strategies", rows)
        say(str({k: v for k, v in row.items() if k != "curves"}))

    def missing(**key: Any) -> bool:
        return not any(all(row.get(k) == v for k, v in key.items()) for row in rows)

    for name in options.models:
        subject = SUBJECTS[name]
        source = load_source(str(subject.source()))
        if missing(model=name, strategy="original"):
            kind = {"model": name, "representation": "float", "bits": 16, "strategy": "original"}
            add(**kind, **subject.evaluate(source.dense(torch.float32), source))
        for scheme in options.schemes or subject.schemes:
            bench = Bench(name, subject, source, scheme, options.folder)
            kind = {"model": name, "representation": scheme, "bits": code_bits(scheme)}
            if missing(**kind, strategy="calibration only"):
                quality = bench.quality(bench.calibrated, {})
                add(**kind, strategy="calibration only", **quality)
            if options.hour:
                if missing(**kind, run="hour"):
                    add(**kind, **bench.hour())
                break
            for seed in options.seeds:
                for strategy in options.strategies:
                    if missing(**kind, strategy=strategy, seed=seed, run=None):
                        add(**kind, **bench.run(strategy, seed))


if __name__ == "__main__":
    main()
