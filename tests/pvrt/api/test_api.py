"""`pvrt.tune`, `pvrt.evaluate`, `pvrt.compare`: what the commands do, with the same results."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import pvrt
from pvrt.cli import app
from pvrt.errors import PvrtError
from pvrt_tune.settings.files import as_yaml
from tests.fixtures.command_line import run
from tests.fixtures.interrupted import interrupted_at
from tests.fixtures.toy import write_toys
from tests.tune.test_pipeline import QUICK

SMALL: dict[str, Any] = {"context": 48, "windows": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, the same on a coarse grid, a text, and a recipe that takes a second."""
    folder = write_toys(tmp_path_factory.mktemp("api"))
    (folder / "quick.yaml").write_text(as_yaml(QUICK))
    return folder


def test_importing_pvrt_is_cheap() -> None:
    script = (
        "import sys, pvrt\n"
        "assert pvrt.tune and pvrt.load and pvrt.evaluate and pvrt.compare\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml', 'typer', 'pvrt_tune',\n"
        "         'pvrt_server', 'pvrt_kernels'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


#: Arguments that are called otherwise than their options; what only one of the two has.
NAMES = {
    "tune": ({"original": "from", "minutes": "for"}, {"on_progress"}, {"dry-run", "quiet", "json"}),
    "eval": ({"original": "kl"}, {"on_progress"}, {"json"}),
    "compare": ({"prompts": "prompt"}, {"on_progress"}, {"json"}),
}


@pytest.mark.parametrize(
    ("command", "function"),
    [("tune", pvrt.tune), ("eval", pvrt.evaluate), ("compare", pvrt.compare)],
)
def test_a_function_takes_what_its_command_takes(
    command: str, function: Callable[..., Any]
) -> None:
    renamed, ours, theirs = NAMES[command]
    arguments = set(inspect.signature(function).parameters) - ours
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    words = {
        word.removeprefix("--")
        for parameter in commands[command].params
        for word in ([parameter.name] if parameter.param_type_name == "argument"
                     else [max(parameter.opts, key=len)])
    }  # fmt: skip
    words = words - theirs - {"continue"} | ({"resume"} if "continue" in words else set())
    assert {renamed.get(name, name).replace("_", "-") for name in arguments} == words


def test_tune_leaves_the_bytes_that_the_command_leaves(place: Path, tmp_path: Path) -> None:
    dense, config = place / "dense", place / "quick.yaml"
    lines: list[str] = []
    ours = tmp_path / "ours"
    checkpoint = pvrt.tune(dense, ours, config=config, seed=3, on_progress=lines.append)
    done = run("tune", str(dense), "-o", str(tmp_path / "theirs"), "--config", str(config),
               "--seed", "3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert checkpoint.path == ours
    files = {file.name for file in (tmp_path / "theirs").iterdir()}
    assert {"README.md", "report.html"} < files
    assert files == {file.name for file in ours.iterdir()}
    for name in files - {".run", "pvrt.json", "report.html", "README.md"}:
        assert (ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    cards = [(tmp_path / side / "README.md").read_text() for side in ("ours", "theirs")]
    assert cards[0].replace("/ours", "/theirs") == cards[1]
    command = f"pvrt tune {dense} -o {ours} --config {config} --seed 3"
    assert f"```\n{command}\n```" in cards[0] and "## Figures" in cards[0]
    told = [
        [line.partition("  moved")[0] for line in told if line.startswith("block ")]
        for told in (lines, done.stdout.splitlines())
    ]
    assert told[0] == told[1] and len(told[0]) == 2  # they end with seconds


def test_a_call_that_is_interrupted_goes_on(place: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"config": place / "quick.yaml", "report": False}
    with interrupted_at("block 1/") as tell:
        pvrt.tune(place / "dense", tmp_path / "out", on_progress=tell, **asked)
    lines: list[str] = []
    resumed = pvrt.tune(place / "dense", tmp_path / "out", on_progress=lines.append, **asked)
    assert not any(line.startswith("block 1/") for line in lines)
    whole = pvrt.tune(place / "dense", tmp_path / "whole", **asked)
    weights = [(made.path / "model.safetensors").read_bytes() for made in (resumed, whole)]
    assert weights[0] == weights[1]
    assert not (tmp_path / "out" / "README.md").exists()


def test_minutes_bind_as_for_does(place: Path, tmp_path: Path) -> None:
    """No time is left for PV-Tuning, which a limit asks for: calibration's checkpoint stays."""
    lines: list[str] = []
    pvrt.tune(place / "dense", tmp_path / "out", config=place / "quick.yaml", minutes=0,
              report=False, on_progress=lines.append)  # fmt: skip
    assert any("the time is over" in line for line in lines)


def test_evaluate_finds_what_the_command_finds(place: Path) -> None:
    lines: list[str] = []
    found = pvrt.evaluate(
        place / "grid", original=place / "dense", text=place / "text.txt", **SMALL,
        on_progress=lines.append,
    )  # fmt: skip
    arguments = ("--text", str(place / "text.txt"), "--context", "48", "--windows", "3", "--json")
    done = run("eval", str(place / "grid"), "--kl", str(place / "dense"), *arguments)
    assert json.loads(done.stdout) == found.record()
    assert found.against is not None and found.against.kl.mean > found.against.noise_floor.mean > 0
    assert any("grid: 3/3" in line for line in lines)
    alone = pvrt.evaluate(place / "grid", text=place / "text.txt", **SMALL)
    done = run("eval", str(place / "grid"), *arguments)
    assert json.loads(done.stdout) == alone.record()
    assert alone.against is None and alone.tasks is None


def test_compare_finds_what_the_command_finds(place: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"text": place / "text.txt", "prompts": ["Hello"], "new_tokens": 6}
    page = tmp_path / "new" / "report.html"
    found = pvrt.compare(place / "dense", place / "codes", place / "grid", html=page, **asked,
                         **SMALL)  # fmt: skip
    done = run(
        *("compare", str(place / "dense"), str(place / "codes"), str(place / "grid"), "--json"),
        *("--text", str(place / "text.txt"), "--context", "48", "--windows", "3"),
        *("--prompt", "Hello", "--new-tokens", "6"),
    )

    def without_speed(comparison: dict[str, Any]) -> dict[str, Any]:
        for figures in (comparison["original"], *comparison["models"]):
            assert figures.pop("tokens_per_second") > 0
        return comparison

    ours = without_speed(json.loads(json.dumps(asdict(found))))
    assert ours == without_speed(json.loads(done.stdout))
    assert f"Measured by pvrt {pvrt.__version__}." in page.read_text()


def test_what_tune_returned_goes_into_the_others(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not opened again."""
    checkpoint = pvrt.tune(
        place / "dense", tmp_path / "out", config=place / "quick.yaml", report=False
    )
    monkeypatch.setattr("pvrt.api.opening._speed", lambda *asked: None)
    opened = pvrt.load(checkpoint, dtype=torch.float32)
    named = pvrt.load(tmp_path / "out", dtype=torch.float32)
    tokens = torch.tensor([[72, 101, 108]])
    assert torch.equal(opened(tokens).logits, named(tokens).logits)
    text: dict[str, Any] = {"text": place / "text.txt", **SMALL}
    assert pvrt.evaluate(checkpoint, **text) == pvrt.evaluate(str(checkpoint.path), **text)
    (figures,) = pvrt.compare(place / "dense", checkpoint, new_tokens=1, **text).models
    assert figures.name == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("call", "command"),
    [
        (lambda: pvrt.tune("/nowhere", "x"), "tune /nowhere -o x"),
        (lambda: pvrt.tune("a", "x", scheme="2bit"), "tune a -o x --scheme 2bit"),
        (lambda: pvrt.tune("a", "x", samples=0), "tune a -o x --samples 0"),
        (lambda: pvrt.tune("a", "x", bits=2.5, scheme="2x8g8"),
         "tune a -o x --bits 2.5 --scheme 2x8g8"),
        (lambda: pvrt.tune("a", "x", minutes=1, pv=False), "tune a -o x --for 1m --no-pv"),
        (lambda: pvrt.tune("a", "x", resume=True, restart=True), "tune a -o x --resume --restart"),
        (lambda: pvrt.tune("a", "x", device="cuda:9"), "tune a -o x --device cuda:9"),
        (lambda: pvrt.tune("a", "x", config="/no.yaml"), "tune a -o x --config /no.yaml"),
        (lambda: pvrt.evaluate("/nowhere"), "eval /nowhere"),
        (lambda: pvrt.evaluate("a", original="a"), "eval a --kl a"),
        (lambda: pvrt.evaluate("a", limit=5), "eval a --limit 5"),
        (lambda: pvrt.evaluate("a", windows=0), "eval a --windows 0"),
        (lambda: pvrt.evaluate("a", text="/no.txt"), "eval a --text /no.txt"),
        (lambda: pvrt.evaluate("a", tasks="b,,c"), "eval a --tasks b,,c"),
        (lambda: pvrt.compare("a", "b", "b"), "compare a b b"),
        (lambda: pvrt.compare("a", "nowhere"), "compare a nowhere"),
        (lambda: pvrt.compare("a", "b", context=2), "compare a b --context 2"),
        (lambda: pvrt.compare("a", "b", html="/"), "compare a b --html /"),
        (lambda: pvrt.load("nowhere"), "inspect nowhere"),
    ],
)  # fmt: skip
def test_errors_are_the_commands(call: Callable[[], Any], command: str) -> None:
    with pytest.raises(PvrtError) as raised:
        call()
    done = run(*command.split())
    assert (done.returncode, done.stderr) == (2, f"pvrt: {raised.value}\n")


#: What no type checker lets through.
WRONG: dict[str, dict[str, Any]] = {
    "effort": {"effort": "hard"},
    "activations": {"activations": "here"},
    "dtype": {"dtype": "int8"},
}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: pvrt.tune("a", "x", **WRONG["effort"]), "--effort is 'hard'; it must be one of"),
        (lambda: pvrt.tune("a", "x", **WRONG["activations"]), "--activations is 'here'; it must"),
        (lambda: pvrt.tune("a", "x", minutes=-1), "--for is -60 seconds"),
        (lambda: pvrt.tune("a", "x", minutes=float("nan")), "--for is nan seconds"),
        (lambda: pvrt.evaluate("a", **WRONG["dtype"]), "--dtype is 'int8'; it must be one of"),
        (lambda: pvrt.compare("a"), "nothing is given to compare"),
    ],
)
def test_what_the_command_line_cannot_ask_for_is_refused_too(
    call: Callable[[], Any], sentence: str
) -> None:
    with pytest.raises(PvrtError, match=sentence):
        call()
