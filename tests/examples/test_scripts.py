"""The scripts of examples/, run on toys as a user runs them."""

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pvrt
from pvrt_server.engine.engine import Engine
from pvrt_tune.settings.files import as_yaml
from tests.fixtures.toy import toy_tokenizer, write_toy
from tests.server.running import PATIENCE, serving
from tests.tune.test_pipeline import QUICK, dense_folder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_client_gets_both_answers(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy")
    with serving(Engine.load(tmp_path / "toy")) as server:
        command = [sys.executable, str(EXAMPLES / "client.py"), f"{server.url}/v1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("toy: ")
    assert "City(name=" in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("most", "kept"), [("100", "5-bits"), ("0.0000001", None)])
def test_bits_are_taken_away_as_long_as_the_kl_allows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    most: str,
    kept: str | None,
) -> None:
    dense_folder(tmp_path / "dense", "llama-tied")
    toy_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "quick.yaml").write_text(
        as_yaml(QUICK).replace("windows: 4\n  length: 128", "windows: 1\n  length: 16")
    )
    small: Any = partial(pvrt.compare, context=48, windows=2, new_tokens=2)
    monkeypatch.setattr(pvrt, "tune", partial(pvrt.tune, config=tmp_path / "quick.yaml"))
    monkeypatch.setattr(pvrt, "compare", small)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "dense"), str(out), "--bits", "5", "6", "--most", most]
    monkeypatch.setattr(sys, "argv", ["compress.py", *arguments])
    code = example("compress").main()
    printed = capsys.readouterr().out
    assert printed.index(f"{out / '6-bits'}: ") > 0
    if kept is None:
        assert code == 1 and not (out / "5-bits").exists() and "no size has a KL" in printed
    else:
        assert code == 0 and f"take {out / kept}: pvrt serve" in printed
        assert (out / kept / "report.html").exists()


def test_what_the_user_can_mend_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compress.py", "/nowhere", "out"])
    assert example("compress").main() == 2
    assert capsys.readouterr().err.startswith("/nowhere does not exist")
