"""How a server ends: its streams say so, and its exit code tells whether it was asked to."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.server.running import PATIENCE, scripted_engine, serving, wait_until
from tests.server.test_launch import RUN_WITH, announced_url


def test_an_engine_that_breaks_ends_its_streams_and_the_process(toy: Path) -> None:
    code = RUN_WITH.format(statement="raise RuntimeError('device lost')")
    command = [sys.executable, "-c", code, str(toy)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = announced_url(process)
        client = openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=PATIENCE)
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
        assert process.wait(PATIENCE) == 1
    finally:
        process.kill()
        process.wait()


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
