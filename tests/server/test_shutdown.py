"""How a server ends: its streams say so, and its exit code tells whether it was asked to."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.running import scripted_engine, serving
from tests.server.test_engine import wait_until
from tests.server.test_launch import announced_url

# The C program fails once a sequence has 30 tokens.
BREAKING = """
import sys
from pathlib import Path
from pvrt_server import cpu_model, models
from pvrt_server.launch import serve
for kind in (cpu_model.CpuModel, models.TransformersModel):
    def step(self, states, tokens, argmax_only=False, step=kind.step):
        if states[0].length >= 30:
            raise RuntimeError("device lost")
        return step(self, states, tokens, argmax_only)
    kind.step = step
sys.exit(serve(Path(sys.argv[1]), port=0, engine="local"))
"""


def test_an_engine_that_breaks_ends_its_streams_and_the_process(toy: Path) -> None:
    command = [sys.executable, "-c", BREAKING, str(toy)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = announced_url(process)
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20)
        stream = client.completions.create(
            model="toy-2bit",
            prompt="ab",
            max_tokens=99,
            stream=True,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        with pytest.raises(openai.APIError, match="device lost"):
            list(stream)
        assert process.wait(20) == 1
    finally:
        process.kill()
        process.wait()


def test_a_stream_that_outlives_the_grace_ends_with_an_error_event(toy: Path) -> None:
    engine, model = scripted_engine(toy, "x" * 400)
    body = {"prompt": "ab", "max_tokens": 400, "stream": True}
    with serving(engine) as server:
        received: list[bytes] = []

        def listen() -> None:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                for piece in response.iter_bytes():
                    received.append(piece)
                    model.gate.clear()

        thread = threading.Thread(target=listen)
        thread.start()
        wait_until(lambda: received)
        engine.stop(0.2)
        refused = server.post("/v1/completions", {"prompt": "ab"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_stopped"
        time.sleep(0.3)
        model.gate.set()
        thread.join(10)
        events = b"".join(received).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "shutting down" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]


def test_an_answer_that_is_done_in_time_is_whole(toy: Path) -> None:
    engine, model = scripted_engine(toy, "one two")
    model.gate.clear()
    answers: list[str] = []
    with serving(engine) as server:

        def ask() -> None:
            body = {"prompt": "ab", "max_tokens": 50}
            answers.append(server.post("/v1/completions", body).json()["choices"][0]["text"])

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: engine.running == 1)
        engine.stop(10)
        model.gate.set()
        thread.join(10)
    assert answers == ["one two"]
