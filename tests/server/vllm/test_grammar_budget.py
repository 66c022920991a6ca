"""Grammars before vLLM sees them, over a stand-in for it that says what it read."""

import re
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from pvrt_server.capacity import installed_vllm
from pvrt_server.engine.loading import load_codec
from pvrt_server.vllm import habits
from pvrt_server.vllm.grammar_budget import GrammarBudget
from tests.server.api.test_tool_schemas import LLAMA3_TEMPLATE


def pattern(letter: str) -> dict[str, Any]:
    return {"type": "string", "pattern": f".*{letter}.{{20}}{letter}.*"}


BOMB = {"type": "string", "allOf": [pattern(chr(97 + i)) for i in range(20)]}
GOOD = {"type": "object", "properties": {"a": {"type": "integer"}}}
WAYS: dict[str, Any] = {
    "response_format": lambda schema: {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    },
    "structured_outputs": lambda schema: {"structured_outputs": {"json": schema}},
    "text": lambda schema: {"text": {"format": {"type": "json_schema", "schema": schema}}},
    "tools": lambda schema: {"tools": [{"function": {"name": "f", "parameters": schema}}]},
}


MARKS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


@pytest.fixture(scope="module")
def client(toy: Path) -> TestClient:
    codec = load_codec(toy)
    codec.tokenizer.add_tokens(MARKS)

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"])])
    return TestClient(GrammarBudget(app, lambda: codec))


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize("field", WAYS)
def test_a_schema_that_costs_too_much_does_not_reach_vllm(client: TestClient, field: str) -> None:
    good = client.post("/", json=WAYS[field](GOOD))
    assert (good.status_code, good.json()) == (200, WAYS[field](GOOD))
    bad = client.post("/", json=WAYS[field](BOMB))
    assert bad.status_code == 400
    assert f"{field} cannot be enforced: it is too complex" in bad.text
    assert bad.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"[" * 100_000,
        b'{"tools": 5, "response_format": []}',
        b'{"tools": [5, {"function": 7}], "structured_outputs": {"json": "{", "regex": 5}}',
        b'{"response_format": {"json_schema": {"schema": {"type": "nosuch"}}}}',
        b"x" * 1_000_000,
    ],
)
def test_what_is_not_ours_to_judge_reaches_vllm_as_it_is(client: TestClient, body: bytes) -> None:
    answer = client.post("/", content=body)
    assert (answer.status_code, answer.content) == (200, body)


CUT: Any = {"function": {"name": "f", "arguments": {"a": 1}}, "id": "c"}


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"tools": [], "tool_choice": "auto", "n": None}, {}),
        ({"stream_options": {"include_usage": True}}, {}),
        (
            {"messages": [{"role": "user"}, {"tool_calls": [CUT]}]},
            {
                "messages": [
                    {"role": "user"},
                    {"tool_calls": [{**CUT, "function": {"name": "f", "arguments": '{"a": 1}'}}]},
                ]
            },
        ),
    ],
)
def test_harmless_habits_do_not_reach_vllm(client: TestClient, given: Any, taken: Any) -> None:
    answer = client.post("/", json={"model": "m", **given})
    assert {"model": "m", **taken} == answer.json()


def test_a_suffix_reaches_vllm_as_the_tokens_that_ask_for_the_middle(
    toy: Path, client: TestClient
) -> None:
    codec = load_codec(toy)
    codec.tokenizer.add_tokens(MARKS)
    given = {"model": "m", "prompt": "def f(", "suffix": "return"}
    taken = {"model": "m", "prompt": codec.encode_gap("def f(", "return")}
    assert client.post("/", json=given).json() == taken
    assert client.post("/", json={**given, "suffix": ""}).json() == {
        "model": "m",
        "prompt": "def f(",
    }
    for wrong in ({"prompt": [1, 2]}, {"prompt": ["a"]}, {"echo": True}):
        refused = client.post("/", json={**given, **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")


def test_a_suffix_is_refused_where_the_model_has_no_tokens_for_it(toy: Path) -> None:
    client = TestClient(GrammarBudget(Starlette(), lambda: load_codec(toy)))
    refused = client.post("/", json={"prompt": "a", "suffix": "b"}).json()["error"]
    assert (refused["param"], refused["code"]) == ("suffix", "unsupported_parameter")


def test_a_template_that_takes_one_call_a_turn_gets_one(toy: Path, client: TestClient) -> None:
    tools = [{"type": "function", "function": {"name": "a"}}]

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    codec = load_codec(toy)
    codec.tokenizer.chat_template = LLAMA3_TEMPLATE
    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    single = TestClient(GrammarBudget(app, lambda: codec))
    for given in ({}, {"parallel_tool_calls": True}, {"parallel_tool_calls": False}):
        body = {"tools": tools, **given}
        assert single.post("/", json=body).json()["parallel_tool_calls"] is False
        assert client.post("/", json=body).json() == body


PLAIN = {"type": "string"}


@pytest.mark.parametrize("field", ["response_format", "structured_outputs", "text"])
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"type": "array", "items": PLAIN, "uniqueItems": True}, {"type": "array", "items": PLAIN}),
        ({**PLAIN, "format": "path"}, PLAIN),
        ({**PLAIN, "format": "multi-host-uri", "minLength": 1}, {**PLAIN, "minLength": 1}),
        ({**PLAIN, "format": "uri", "minLength": 1}, {**PLAIN, "format": "uri"}),
        ({**PLAIN, "pattern": "^(?!a)b$", "maxLength": 1}, {**PLAIN, "pattern": "^b$"}),
        ({"type": "integer", "multipleOf": 5}, {"type": "integer"}),
        ({"propertyNames": {"maxLength": 3}}, {}),
    ],
)
def test_schemas_reach_vllm_without_what_xgrammar_does_not_know(
    client: TestClient, field: str, given: dict[str, Any], taken: dict[str, Any]
) -> None:
    whole = {"type": "object", "properties": {"a": given}, "additionalProperties": False}
    body = client.post("/", json=WAYS[field](whole)).json()
    assert body == WAYS[field]({**whole, "properties": {"a": taken}})
    assert client.post("/", json=body).json() == body


def test_tools_that_must_be_called_are_strict(client: TestClient) -> None:
    tools: Any = [{"type": "function", "function": {"name": n, "parameters": {}}} for n in "ab"]
    flat: Any = [{"type": "function", "name": "a", "parameters": {}}, {"type": "web_search"}]
    tools[1]["function"]["strict"] = False
    for choice, strict in ((None, []), ("auto", []), ("none", []), ("required", [True, False])):
        body = client.post("/", json={"tools": tools, "tool_choice": choice}).json()
        found = [tool["function"]["strict"] for tool in body["tools"] if choice == "required"]
        assert found == strict
        assert strict or body["tools"] == tools
    body = client.post("/", json={"tools": flat, "tool_choice": {"name": "a"}}).json()
    assert body["tools"] == [{**flat[0], "strict": True}, flat[1]]


def test_a_schema_that_cannot_be_is_blamed_on_its_tool(client: TestClient) -> None:
    wrong = {"name": "b", "parameters": {"properties": {"x": {"$ref": "#/$defs/P"}}}}
    tools = [
        {"type": "function", "function": f} for f in ({"name": "a", "parameters": GOOD}, wrong)
    ]
    flat = [{"type": "function", **wrong}]
    for given in (tools, flat):
        assert client.post("/", json={"tools": given}).json() == {"tools": given}
        refused = client.post("/", json={"tools": given, "tool_choice": "required"})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "tools")
        assert error["message"].startswith("tools: the schema of 'b' cannot be enforced: ")
        assert "/$defs/P" in error["message"]


def test_what_xgrammar_does_not_know_is_what_vllm_says() -> None:
    folder = installed_vllm()
    if folder is None:
        pytest.skip("vLLM is not installed")
    said = (folder / "v1/structured_output/backend_xgrammar.py").read_text(encoding="utf-8")
    formats = re.search(r"STRING_SUPPORTED_FORMATS = \{(.*?)\}", said, re.DOTALL)
    assert formats is not None
    assert set(re.findall(r'"(.*?)"', formats[1])) == habits._FORMATS
    assert [key for key in habits._UNKNOWN if f'"{key}"' not in said] == []
