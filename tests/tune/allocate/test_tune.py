"""`pvrt tune --bits` from a toy model to a checkpoint of several schemes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pvrt
from pvrt.tools.report import describe
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.on_machine import plan_here
from pvrt_tune.settings import (
    AllocationSettings,
    FinetuneSettings,
    FitSettings,
    Recipe,
    TrainSettings,
    TuneJob,
)
from tests.fixtures.toy import toy_model, toy_tokenizer


@pytest.mark.slow
def test_the_checkpoint_has_the_bits_and_runs(tmp_path: Path) -> None:
    dense = toy_model("llama-tied").to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    toy_tokenizer().save_pretrained(tmp_path / "dense")
    recipe = Recipe(
        bits=5.5,
        allocation=AllocationSettings(windows=2, length=16),
        samples=4,
        length=32,
        fit=FitSettings(rounds=1, kmeans_iterations=4, cg_iterations=2, beam=1),
        finetune=FinetuneSettings(epochs=1),
        training=TrainSettings(
            windows=4, steps=2, batch=2, microbatch=2, held_out=2, evaluate_every=1
        ),
    )
    job = TuneJob(str(tmp_path / "dense"), tmp_path / "out", recipe)
    plan, problems = plan_here(job)
    assert not problems
    lines: list[str] = []
    checkpoint = tune(job, lines.append)
    checkpoint.verify()
    report = describe(checkpoint)
    assert 5.3 < report["bits_per_weight_file"] <= 5.5
    assert abs(plan["result"]["file_bytes"] / checkpoint.file_bytes() - 1) < 0.03
    assert len(checkpoint.schemes) > 1
    assert "model.embed_tokens" in checkpoint.layers
    assert any(line.startswith("bits shared out") for line in lines)
    tokens = torch.arange(24).unsqueeze(0)
    logits = pvrt.load(tmp_path / "out")(tokens).logits
    assert torch.isfinite(logits).all()
    again = tune(replace(job, resume=True), lines.append)
    assert again.file_bytes() == checkpoint.file_bytes()
