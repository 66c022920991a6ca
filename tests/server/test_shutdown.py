"""How a server ends: its streams say so, and its exit code tells whether it was asked to."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from pvrt_server.api import local_server
from pvrt_server.backend import choose_backend
from pvrt_server.capacity import this_machine
from pvrt_server.engine.cpu_model import CpuModel
from pvrt_server.opened import open_model
from pvrt_server.options import ServeOptions
from tests.server.running import PATIENCE, scripted_engine, serving, wait_until


def test_an_engine_that_breaks_ends_its_streams_and_the_server(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: CpuModel, states: Any, *rest: Any, step: Any = CpuModel.step) -> Any:
        if states[0].length == 30:
            raise RuntimeError("device lost")
        return step(self, states, *rest)

    monkeypatch.setattr(CpuModel, "step", step)
    monkeypatch.setattr(local_server, "GRACE_SECONDS", 600)
    said: list[str] = []

    def ask() -> bool:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        client = openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=PATIENCE)
        try:
            stream = client.completions.create(
                model=toy.name,
                prompt="ab",
                max_tokens=99,
                stream=True,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            list(stream)
        except openai.APIError as error:
            said.append(str(error))
        return not any("device lost" in one for one in said)  # or nothing would end the server

    opened, options = open_model(toy), ServeOptions(engine="local", port=0, api_key="k")
    decision = choose_backend(opened, options, this_machine(1))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert local_server.serve_local(opened, options, decision, listener, ask) == 1
    (sentence,) = said
    assert sentence.endswith("device lost")


def test_a_stream_that_outlives_the_grace_ends_with_an_error_event(toy: Path) -> None:
    engine, model = scripted_engine(toy, "x" * 400)
    model.hold_after = 2
    body = {"prompt": "ab", "max_tokens": 400, "stream": True}
    with serving(engine) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/v1/completions", body)
        wait_until(lambda: not model.gate.is_set())
        engine.stop(0)
        refused = server.post("/v1/completions", {"prompt": "ab"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_stopped"
        model.gate.set()
        events = answer.result().text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "shutting down" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]
    assert len(events) >= 3 + 2  # what was generated is there


def test_an_answer_that_is_done_in_time_is_whole(toy: Path) -> None:
    engine, model = scripted_engine(toy, "one two")
    model.gate.clear()
    with serving(engine) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/v1/completions", {"prompt": "ab", "max_tokens": 50})
        wait_until(lambda: engine.running == 1)
        engine.stop(PATIENCE)
        model.gate.set()
        assert answer.result().json()["choices"][0]["text"] == "one two"
