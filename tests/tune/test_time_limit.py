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
from pvrt_tune.time_limit import Cuts, TimeLimit, part
from tests.fixtures.toy import toy_model
from tests.tune.test_pipeline import QUICK, dense_folder


def test_a_limit_counts_from_its_start() -> None:
    limit = TimeLimit(10.0, started=5.0)
    assert (limit.until(), limit.until(0.5)) == (15.0, 10.0)
    assert TimeLimit(10.0).started <= time.monotonic()
    assert limit.over(1.0) and not TimeLimit(1e9).over(0.5)
    none = TimeLimit()
    assert none.until() is None and not none.over(0.0)


def test_cuts_are_what_there_is_time_for() -> None:
    assert Cuts.of(100.0, work=60.0, text=20.0) == Cuts()
    assert Cuts.of(100.0, work=240.0, text=20.0) == Cuts(work=0.25)
    assert Cuts.of(100.0, work=240.0, text=80.0) == Cuts(work=0.25, text=0.25)
    assert Cuts.of(100.0, work=0.0, text=0.0) == Cuts()
    assert [part(count, 0.25, 2) for count in (100, 9, 4, 1)] == [25, 3, 2, 1]


def test_text_is_written_in_parts_until_there_is_enough() -> None:
    model, asked = toy_model("llama"), []

    def enough(done: int) -> bool:
        asked.append(done)
        return done >= 20

    written = from_model(model, Windows(40, 12, seed=0), enough=enough)
    assert asked == [16, 32]
    assert written.tokens.shape == (32, 12)
    again = from_model(model, Windows(40, 12, seed=0), enough=lambda done: False)
    assert torch.equal(again.tokens[:32], written.tokens)
    assert len(again) == 40


FIT = replace(QUICK.fit, rounds=3, kmeans_iterations=20)
LONG = replace(
    QUICK,
    samples=64,
    length=256,
    fit=FIT,
    finetune=replace(QUICK.finetune, epochs=2),
    training=TrainSettings(steps=4, batch=2, held_out=4, windows=64),
)


def test_no_time_at_all_still_gives_a_checkpoint(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    out = tmp_path / "out"
    lines: list[str] = []
    tune(TuneJob(str(tmp_path / "dense"), out, LONG, seconds=1e-3), lines.append)
    said = "\n".join(lines)
    assert "have time for 0% of their work" in said
    assert "12 of 68 windows have to do" in said  # held-out ones, and 8 more
    assert "the time is over" in said
    assert torch.isfinite(pvrt.load(out)(torch.tensor([[1, 2, 3]])).logits).all()


def test_blocks_that_take_too_long_see_less_text(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(80_000)))
    lines: list[str] = []
    job = TuneJob(str(tmp_path / "dense"), out, LONG, data=str(text), seconds=1e-3)
    tune(job, lines.append)
    assert "the time is short: blocks" in "\n".join(lines)
    journal = (out / ".run" / "journal.jsonl").read_text().splitlines()
    pieces = [piece for piece in map(json.loads, journal) if "block-" in piece.get("name", "")]
    windows = [piece["report"]["windows"] for piece in pieces]
    assert windows[0] == 64 and windows[-1] < 64, lines
    assert torch.isfinite(pvrt.load(out)(torch.tensor([[1, 2, 3]])).logits).all()
