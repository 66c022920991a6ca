"""`--for`: a run whose time is short leaves out text and work, and nothing that a user needs."""

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import pvrt
from pvrt_tune.data.sampled import from_model
from pvrt_tune.data.text import Windows
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import TrainSettings, TuneJob
from pvrt_tune.time_limit import TimeLimit
from tests.fixtures.toy import toy_model
from tests.tune.test_pipeline import QUICK, dense_folder


def test_a_limit_counts_from_its_start() -> None:
    limit = TimeLimit(10.0, started=5.0)
    assert (limit.until(), limit.until(0.5)) == (15.0, 10.0)
    assert TimeLimit(10.0).started <= time.monotonic()


def test_text_is_written_in_parts_until_there_is_enough() -> None:
    model, asked = toy_model("llama"), []

    def enough(done: int) -> bool:
        asked.append(done)
        return done >= 8

    written = from_model(model, Windows(24, 12, seed=0), enough=enough)
    assert asked == [3, 6, 9]
    assert written.tokens.shape == (9, 12)
    again = from_model(model, Windows(24, 12, seed=0), enough=lambda done: False)
    assert torch.equal(again.tokens[:9], written.tokens)
    assert len(again) == 24


def test_no_time_at_all_still_gives_a_checkpoint(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    training = TrainSettings(steps=4, batch=2, held_out=4, windows=64)
    fit = replace(QUICK.fit, rounds=3, kmeans_iterations=20)
    finetune = replace(QUICK.finetune, epochs=2)
    recipe = replace(QUICK, samples=64, length=256, fit=fit, finetune=finetune, training=training)
    out = tmp_path / "out"
    lines: list[str] = []
    tune(TuneJob(str(tmp_path / "dense"), out, recipe, seconds=1e-3), lines.append)
    said = "\n".join(lines)
    assert "18 windows of text have to do" in said  # two eighths of 68: held-out ones, and 8 more
    assert "have time for 0% of their work" in said
    assert "the time is short: blocks" in said
    assert "the time is over" in said
    journal = (out / ".run" / "journal.jsonl").read_text().splitlines()
    pieces = [
        event for event in map(json.loads, journal) if event.get("name", "").startswith("block")
    ]
    windows = [piece["report"]["windows"] for piece in pieces]
    assert windows == sorted(windows, reverse=True)
    assert torch.isfinite(pvrt.load(out)(torch.tensor([[1, 2, 3]])).logits).all()
