"""Text in tokens that a model was never given."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pvrt.cli import app
from pvrt.errors import DataError
from pvrt_tune.pipeline import tune
from pvrt_tune.settings import TuneJob
from tests.fixtures.toy import toy_tokenizer
from tests.tune.test_pipeline import QUICK, dense_folder, silent


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    dense_folder(tmp_path / "dense", "llama")
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([f"w{n}w" for n in range(300)])
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("hello w290w there " * 300)
    sentence = "has token .*, and the model knows 384"
    with pytest.raises(DataError, match=sentence):
        job = TuneJob(str(tmp_path / "dense"), tmp_path / "out", QUICK, str(tmp_path / "text.txt"))
        tune(job, silent)
    result = CliRunner().invoke(
        app, ["eval", str(tmp_path / "dense"), "--text", str(tmp_path / "text.txt")]
    )
    assert isinstance(result.exception, DataError)
