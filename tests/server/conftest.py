from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pvrt_server.engine import grammar_check
from pvrt_server.engine.engine import Engine
from pvrt_server.self_test import Target
from tests.fixtures.toy import write_toy
from tests.server.running import PATIENCE, Server, scripted_engine, serving, vllm_serving


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy AQLM checkpoint, float32."""
    folder = tmp_path_factory.mktemp("serve") / "toy-2bit"
    write_toy(folder)
    return folder


@pytest.fixture(scope="session")
def server(toy: Path) -> Iterator[Server]:
    """The toy checkpoint, served."""
    with serving(Engine.load(toy)) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    """The official client of `server`."""
    return server.client()


@pytest.fixture(scope="session")
def says(toy: Path) -> Iterator[Server]:
    """A server that answers every prompt with "one two three 😀 four"."""
    engine, _ = scripted_engine(toy, "one two three 😀 four")
    with serving(engine) as running:
        yield running


@pytest.fixture
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars that cost too much are found out in one CPU second: tests hold many of them. It may
    be long in coming on a machine that is busy.
    """
    monkeypatch.setattr(grammar_check, "_CPU_SECONDS", 1)
    monkeypatch.setattr(grammar_check, "_SECONDS", PATIENCE)


@pytest.fixture(scope="session")
def vllm_server(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """vLLM, started by `serve` on the toy checkpoint in float32, with a key. Starts once."""
    options = {"served_model_name": "toy", "api_key": "secret"}
    with vllm_serving(toy, tmp_path_factory.mktemp("vllm") / "log", **options) as target:
        yield target
