"""Blocks run one by one compute what their model does; where they cannot, plan says so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pvrt
from pvrt.errors import SourceError
from pvrt_tune.data.activations import Activations, in_memory
from pvrt_tune.data.source_model import load_skeleton, load_source
from pvrt_tune.model_blocks import find_blocks, run_block
from pvrt_tune.model_calls import record_inputs, run_head
from pvrt_tune.pipeline import tune
from pvrt_tune.plan.on_machine import plan_here
from pvrt_tune.settings import Recipe, TuneJob
from tests.fixtures.decoders import DECODERS, REFUSED, decoder
from tests.fixtures.toy import toy_tokenizer
from tests.tune.test_pipeline import QUICK

KEPT = replace(QUICK, embeddings="keep")


def dense(folder: Path, name: str) -> Any:
    model = decoder(name)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return model


def job(tmp_path: Path, recipe: Recipe = KEPT) -> TuneJob:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return TuneJob(
        str(tmp_path / "dense"), tmp_path / "out", recipe, str(tmp_path / "text.txt"), "cpu"
    )


@pytest.mark.parametrize("name", DECODERS)
def test_blocks_one_by_one_are_the_model(tmp_path: Path, name: str) -> None:
    """Over two batches of other tokens: what depends on them must not be the first one's."""
    dense(tmp_path, name)
    model = load_source(str(tmp_path)).dense(torch.float32)
    blocks = find_blocks(model)
    tokens = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(0))
    hidden = Activations(in_memory((4, 12, 64)), 2, "cpu")
    arguments = record_inputs(model, blocks, tokens, 2, hidden)
    with torch.no_grad():
        for block, own in zip(blocks.blocks, arguments, strict=True):
            for number, states in enumerate(hidden):
                hidden[number] = run_block(block, states, own[number])
        parts = zip(tokens.view(2, 2, 12), hidden, strict=True)
        found = torch.cat([run_head(model, blocks, part, states) for part, states in parts])
        torch.testing.assert_close(found, model(tokens, use_cache=False).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DECODERS.keys() - REFUSED.keys()))
def test_what_plan_accepts_is_tuned_and_loads(tmp_path: Path, name: str) -> None:
    model = dense(tmp_path / "dense", name)
    plan_here(job(tmp_path))
    tune(job(tmp_path), lambda line: None)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(tokens, use_cache=False).logits
        found = pvrt.load(tmp_path / "out", dtype=torch.float32)(tokens, use_cache=False).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.9  # of other models: 1.4


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_are_not_apart_are_refused_by_plan(tmp_path: Path, name: str) -> None:
    dense(tmp_path / "dense", name)
    with pytest.raises(SourceError, match="cannot be tuned one by one"):
        plan_here(job(tmp_path))


@pytest.mark.parametrize(
    ("name", "scheme", "sentence"),
    [
        ("qwen3_next", "w4g16", r"has experts, .* give --scheme w4g16s"),
        (
            "falcon",
            "w4g16s",
            r"reads the weights of linear layers, .* give a --scheme of codebooks",
        ),
        ("openai-gpt", "w4g16s", r"is a Conv1DLinear, .* give a --scheme of codebooks"),
        ("gpt_oss", "w4g16s", r"experts that are stored fused .* give a --scheme of codebooks"),
    ],
)
def test_grids_that_would_not_load_are_refused_by_plan(
    tmp_path: Path, name: str, scheme: str, sentence: str
) -> None:
    dense(tmp_path / "dense", name)
    with pytest.raises(SourceError, match=sentence):
        plan_here(job(tmp_path, replace(KEPT, scheme=scheme)))


@pytest.mark.parametrize("scheme", ["w4g16", "w4g16s"])
def test_a_head_with_another_name_in_files_stays_off_the_grid(tmp_path: Path, scheme: str) -> None:
    model = dense(tmp_path / "dense", "gpt_neox")
    tune(job(tmp_path, replace(KEPT, scheme=scheme)), lambda line: None)
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        wanted = model(tokens).logits
        found = pvrt.load(tmp_path / "out", dtype=torch.float32)(tokens).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.2


def test_a_layer_that_does_not_divide_stays_dense(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from pvrt.format.aqlm import Checkpoint
    from tests.fixtures.toy import random_model

    settings = {**DECODERS["nanochat"], "intermediate_size": 100}
    random_model(AutoConfig.for_model("llama", **settings)).save_pretrained(tmp_path / "dense")
    toy_tokenizer().save_pretrained(tmp_path / "dense")
    lines: list[str] = []
    tune(job(tmp_path), lines.append)
    dense = "model.layers.0.mlp.down_proj"
    assert any("model.layers.0.: mlp.down_proj stay dense" in line for line in lines)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert dense not in checkpoint.layers and f"{dense}.weight" in checkpoint.tensors
    assert "model.layers.0.mlp.up_proj" in checkpoint.layers
    pvrt.load(tmp_path / "out")
    with pytest.raises(SourceError, match="cannot cut into groups of 128"):
        plan_here(job(tmp_path, replace(KEPT, scheme="w4g128")))


def test_windows_longer_than_the_model_are_refused_by_plan(tmp_path: Path) -> None:
    dense(tmp_path / "dense", "opt")
    from pvrt.errors import RunError

    with pytest.raises(RunError, match=r"windows of 257 tokens .* the 256 .* --length 256"):
        plan_here(job(tmp_path, replace(KEPT, length=257)))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_attention_of_another_machine_is_not_asked_for(tmp_path: Path, key: str) -> None:
    from pvrt.format.aqlm import read_config
    from pvrt.format.atomic import as_json

    dense(tmp_path, "nanochat")
    config = {**read_config(tmp_path), key: "flash_attention_2"}
    (tmp_path / "config.json").write_bytes(as_json(config))
    load_skeleton(str(tmp_path))
