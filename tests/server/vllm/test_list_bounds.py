"""Hostile requests before vLLM sees them, over a stand-in for it that says what it read."""

import time
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from pvrt_server.engine.loading import load_codec
from pvrt_server.vllm.grammar_budget import GrammarBudget
from pvrt_server.vllm.list_bounds import MOST_ITEMS
from tests.server import abuse

#: CPU seconds of this process, client and server together.
SECONDS = 2
#: What vLLM itself refuses at little cost, or takes.
VLLMS = {
    *("a long prompt", "many tokens", "a token of no model", "tokens without number"),
    *("scores without number", "a long message", "many biases", "unknown fields of a format"),
    *("a long name", "a template of its own", "truths"),
}


@pytest.fixture(scope="module")
def client(toy: Path) -> TestClient:
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    app = Starlette(routes=[Route("/{path:path}", echo, methods=["POST"])])
    return TestClient(GrammarBudget(app, lambda: load_codec(toy)))


@pytest.mark.parametrize("name", sorted(abuse.REFUSED.keys() - VLLMS))
def test_the_first_wrong_item_is_the_last_that_is_read(client: TestClient, name: str) -> None:
    path, body = abuse.REFUSED[name]
    started = time.process_time()
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text[:300]
    assert len(answer.content) < 3000
    assert time.process_time() - started < SECONDS


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize("place", ["format", "tool", "text", "vLLM's own", "tags"])
def test_a_schema_without_end_is_refused_wherever_it_is(client: TestClient, place: str) -> None:
    for name in ("patterns together", "a megabyte"):
        path, body = abuse.GRAMMARS[f"{name}: {place}"]
        answer = client.post(path, json=body)
        assert answer.status_code == 400 and "cannot be enforced" in answer.text


@pytest.mark.usefixtures("short_check")
def test_many_schemas_have_one_budget(client: TestClient) -> None:
    def tool(number: int) -> dict[str, Any]:  # tenths of a second each
        costly = {"type": "string", "allOf": [abuse.pattern(chr(97 + i)) for i in range(14)]}
        schema = {"anyOf": [costly, {"const": number}]}
        return {"type": "function", "function": {"name": "f", "parameters": schema}}

    body = {"messages": [abuse.HELLO], "tools": [tool(i) for i in range(40)]}
    answer = client.post(abuse.CHAT, json=body)
    assert answer.status_code == 400 and "tools cannot be enforced" in answer.text
    one = {**body, "tools": body["tools"][:1]}
    assert client.post(abuse.CHAT, json=one).json() == one


LONG = [*[f"a long enum: {place}" for place in ("format", "tool", "text")], "a long grammar"]


@pytest.mark.parametrize("name", LONG)
def test_what_takes_xgrammar_minutes_is_refused_by_its_length(
    client: TestClient, name: str
) -> None:
    path, body = abuse.GRAMMARS[name]
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and "the most is" in answer.text
    if "tools" in body:  # which nothing is compiled for unless they must be called
        free = {**body, "tool_choice": "auto"}
        assert client.post(path, json=free).status_code == 200
        tools = [{**each, "strict": True} for each in body["tools"]]
        assert client.post(path, json={**free, "tools": tools}).status_code == 400


SOUND: list[tuple[str, dict[str, Any]]] = [
    (abuse.COMPLETIONS, {"prompt": "a"}),
    (abuse.COMPLETIONS, {"prompt": [1, 2]}),
    (abuse.COMPLETIONS, {"prompt": [[1], [2, 3]], "n": 2}),
    (abuse.COMPLETIONS, {"prompt": ["a", "b"], "stop": ["x"], "logit_bias": {"1": -5}}),
    (abuse.COMPLETIONS, {"prompt": None, "prompt_embeds": "x"}),
    (abuse.COMPLETIONS, {"prompt": "a", "n": "many", "unknown": [1, "a"]}),
    (abuse.CHAT, {"messages": [abuse.HELLO] * MOST_ITEMS}),
    (abuse.CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
    (abuse.RESPONSES, {"input": "a"}),
    (abuse.RESPONSES, {"input": [abuse.HELLO, {"type": "function_call_output", "output": "x"}]}),
    ("/v1/embeddings", {"input": [[1], [2]]}),
    ("/detokenize", {"tokens": [1, 2]}),
]


@pytest.mark.parametrize(("path", "body"), SOUND)
def test_what_is_sound_passes_as_it_is(client: TestClient, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()) == (200, body)
