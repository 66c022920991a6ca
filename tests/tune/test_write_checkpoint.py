"""What the writer of checkpoints leaves for those who check them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pvrt.cli import app
from pvrt.format.grid import open_checkpoint
from pvrt.tools import deep
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import FitSettings, Recipe, TuneJob
from tests.fixtures.toy import small_llama, toy_tokenizer

RECIPE = Recipe(
    scheme="2x8g8",
    samples=2,
    length=32,
    fit=FitSettings(rounds=1, kmeans_iterations=2, cg_iterations=1, beam=1),
)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A model that is tuned in a second."""
    small_llama().save_pretrained(tmp_path / "dense")
    toy_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def manifest(out: Path) -> Any:
    return json.loads((out / "pvrt.json").read_text())


@pytest.mark.parametrize("scheme", ["2x8g8", "w4g32"])
def test_a_run_leaves_greedy_tokens_that_inspect_finds_again(
    dense: Path, tmp_path: Path, scheme: str
) -> None:
    out = tmp_path / "out"
    tune(TuneJob(str(dense), out, replace(RECIPE, scheme=scheme)), lambda line: None)
    noted = manifest(out)["greedy"]
    assert toy_tokenizer().decode(noted["prompt"]) == deep.PROMPT
    assert len(noted["tokens"]) == deep.TOKENS
    assert deep.check_deep(open_checkpoint(out))["greedy_tokens"] == deep.TOKENS
    inspect = ["inspect", str(out), "--deep"]
    done = CliRunner().invoke(app, inspect)
    assert done.exit_code == 0 and "16 as pvrt.json has them" in done.stdout


def test_a_run_without_memory_to_load_its_result_says_so_and_is_whole(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep, "free_host_bytes", lambda: 1000)
    out, lines = tmp_path / "out", list[str]()
    tune(TuneJob(str(dense), out, RECIPE), lines.append)
    (said,) = (line for line in lines if "greedy tokens" in line)
    assert said.startswith("pvrt.json goes without greedy tokens: ") and "GB are free" in said
    assert "greedy" not in manifest(out)
    open_checkpoint(out).verify()
    lines.clear()
    tune(TuneJob(str(dense), out, RECIPE), lines.append)
    assert f"{out} is already complete; --restart tunes it again" in lines
