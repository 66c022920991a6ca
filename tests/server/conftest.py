import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pvrt_server.engine.engine import Engine
from pvrt_server.self_test import Target
from tests.fixtures.toy import write_toy
from tests.server.running import PATIENCE, Server, scripted_engine, serving


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


@pytest.fixture(scope="session")
def vllm_server(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """vLLM, started by `serve` on the toy checkpoint in float32, with a key. Starts once."""
    code = (
        "import sys; from pathlib import Path; from pvrt_server.launch import serve; "
        "from pvrt_server.options import ServeOptions; "
        f"sys.exit(serve(Path({str(toy)!r}), ServeOptions(engine='vllm', port=0, "
        "served_model_name='toy', api_key='secret', dtype='float32', "
        "extra=('--enforce-eager', '--max-num-seqs', '4'))))"
    )
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if "is served at" in line), None)
            if line is None:
                pytest.fail(log.read_text()[-3000:])
            yield Target(line.split()[-1].removesuffix("/v1"), "toy", "secret", chat=True)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
