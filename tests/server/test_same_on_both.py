"""What clients of either engine rely on holds on both: one model, served twice, asked the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from pvrt_server.engine.engine import Engine
from pvrt_server.engine.loading import load_codec
from tests.fixtures.toy import write_toy
from tests.server.running import PATIENCE, serving, vllm_serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MARKS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "Write <tool_call> around calls.<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ORIGIN = "http://localhost:3000"
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint with tokens for gaps, tools, and 512 tokens of context scaled by YaRN."""
    folder = tmp_path_factory.mktemp("both") / "toy"
    write_toy(folder, "qwen3")
    tokenizer = load_codec(folder).tokenizer
    tokenizer.add_tokens(MARKS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**YARN, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def both(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where each engine serves it, without any flag about its context."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = {"allowed_origins": ORIGIN}
    with (
        serving(Engine.load(folder), **options) as ours,
        vllm_serving(folder, log, served_model_name="toy", **options) as theirs,
    ):
        yield {"local": ours.url, "vllm": theirs.url}


@pytest.fixture(params=["local", "vllm"])
def url(both: dict[str, str], request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    return both[request.param]


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, timeout=5 * PATIENCE)


def chat(url: str, **body: Any) -> httpx.Response:
    given = {"model": "toy", "messages": HELLO, "temperature": 0, "max_tokens": 4, **body}
    return post(url, "/v1/chat/completions", **given)


def completed(url: str, **body: Any) -> Any:
    given = {"model": "toy", "temperature": 0, "max_tokens": 32, "logprobs": 0, **body}
    return post(url, "/v1/completions", **given).json()


def test_a_scaled_context_is_offered_and_read_alike(both: dict[str, str]) -> None:
    prompt = [7 * place % 90 for place in range(1900)]
    for url in both.values():
        cards = httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"]
        assert cards[0]["max_model_len"] == 2048
        assert "2048" in completed(url, prompt=[1] * 2100)["error"]["message"]
    ours, theirs = (completed(url, prompt=prompt)["choices"][0] for url in both.values())
    assert ours["text"] == theirs["text"]
    scores, expected = (choice["logprobs"]["token_logprobs"] for choice in (ours, theirs))
    assert scores == pytest.approx(expected, abs=1e-3)


def test_a_suffix_asks_both_for_the_same_middle(both: dict[str, str]) -> None:
    gap = {"prompt": "def f(x):\n    return ", "suffix": "\nprint(f(2))"}
    ours, theirs = (completed(url, **gap) for url in both.values())
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
    assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
    for url in both.values():
        plain = completed(url, prompt=gap["prompt"], suffix="")
        assert plain["choices"][0]["text"] != ours["choices"][0]["text"]
        assert completed(url, prompt=[1, 2], suffix="b")["error"]["param"] == "suffix"


class Person(pydantic.BaseModel):
    age: Literal[7]


def with_person(place: str) -> Any:
    """A tool whose parameters hold a schema at a place of their own."""
    parameters = {
        "type": "object",
        "properties": {"who": {"$ref": f"#/{place}/Person"}},
        "required": ["who"],
        place: {"Person": Person.model_json_schema()},
    }
    return {"type": "function", "function": {"name": "greet", "parameters": parameters}}


@pytest.mark.parametrize("place", ["$defs", "definitions"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "greet"}}]
)
def test_references_of_a_tool_that_must_be_called_hold(url: str, place: str, choice: Any) -> None:
    answer = chat(
        url, tools=[with_person(place)], tool_choice=choice, max_tokens=200, seed=1, temperature=1
    )
    assert answer.status_code == 200, answer.text
    calls = answer.json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"who": {"age": 7}}


def test_a_schema_that_cannot_be_is_blamed_on_its_tool(url: str) -> None:
    wrong = with_person("$defs")
    wrong["function"]["parameters"]["$defs"] = {}
    answer = chat(url, tools=[wrong], tool_choice="required")
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert "greet" in error["message"]
    assert error["param"] == "tools"


FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL: Any = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_effort": "low", "verbosity": "low", "include_reasoning": False},
        {"cache_prompt": True, "keep_alive": "5m", "num_ctx": 4096},
        {"thinking": {"type": "disabled"}, "add_generation_prompt": True},
        {"continue_final_message": False, "priority": 0, "request_id": "r", "cache_salt": "x"},
        {"repeat_penalty": 1.1, "suffix": "x", "num_ctx": 9, "user": "ann"},
        {"provider": {"order": ["x"]}, "usage": {"include": True}, "prediction": None},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]},
        {"tools": [{**TOOL, "strict": True}]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "returns": "x"}}]},
        {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
        {"max_completion_tokens": 4, "n": 1, "logit_bias": {}, "top_k": -1},
    ],
)
def test_what_changes_no_answer_is_accepted(url: str, extra: dict[str, Any]) -> None:
    answer = chat(url, **extra)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "Hi", "id": "1", "opts": {"visible": True}, "timestamp": 1},
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {}}]},
        {"role": "assistant", "content": "Hi", "provider_specific_fields": {"refusal": None}},
        {"role": "assistant", "content": "Hi", "thinking_blocks": [], "reasoning": "why"},
        {"role": "assistant", "content": "Hi", "function_call": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Hi"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "", "tool_calls": []},
    ],
)
def test_what_clients_keep_with_messages_is_accepted(url: str, message: Any) -> None:
    answer = chat(url, messages=[*HELLO, message, *HELLO])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "arguments", ['{"city": "Par', "", "null", "[1]", "Paris", {"city": "Paris"}]
)
def test_calls_come_back_however_they_were_cut(url: str, arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    told = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "name": "f", "content": "bad arguments"},
    ]
    answer = chat(url, messages=[*HELLO, *told, *HELLO], tools=[TOOL])
    assert answer.status_code == 200, answer.text


def object_of(schema: Any, **more: Any) -> Any:
    return {"type": "object", "properties": {"x": schema}, "required": ["x"], **more}


TEXT = {"type": "string"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {**TEXT, "maxLength": 2}, "uniqueItems": True, "maxItems": 2},
        {"anyOf": [{"type": "number"}, {**TEXT, "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {**TEXT, "not": {"const": "no"}, "maxLength": 3},
        {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"enum": [1]}},
        *({**TEXT, "format": name} for name in ("path", "binary", "password", "ipvanyaddress")),
        *({**TEXT, "format": name} for name in ("uri", "json-string", "postgres-dsn", "duration")),
        {**TEXT, "contentEncoding": "base64", "maxLength": 3},
        {"allOf": [{"$ref": "#/$defs/P"}], "description": "d"},
    ],
)
def test_schemas_of_generators_are_taken(url: str, schema: Any) -> None:
    whole = object_of(schema, additionalProperties=False)
    whole["$defs"] = {"P": object_of({"enum": [1, 2]}, additionalProperties=False)}
    form = {"type": "json_schema", "json_schema": {"name": "m", "schema": whole}}
    answer = chat(url, response_format=form, max_tokens=60)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["message"]["content"]).keys() == {"x"}
    tool = {"type": "function", "function": {"name": "f", "parameters": whole}}
    for select in ("auto", "required"):
        called = chat(url, tools=[tool], tool_choice=select, max_tokens=60)
        assert called.status_code == 200, called.text


def test_the_events_of_a_streamed_response(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=5 * PATIENCE) as client:
        stream = client.responses.create(
            model="toy", input="Hello", max_output_tokens=16, stream=True, temperature=0
        )
        events = list(stream)
        whole = client.responses.create(
            model="toy", input="Hello", max_output_tokens=16, temperature=0
        )
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text != ""


def test_pages_of_an_allowed_origin_may_call_and_read_every_answer(url: str) -> None:
    origin = {"Origin": ORIGIN}
    asked = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    for path in ("/v1/chat/completions", "/v1/models"):
        answer = httpx.options(f"{url}{path}", headers=asked, timeout=PATIENCE)
        assert answer.status_code in (200, 204)
        assert answer.headers["Access-Control-Allow-Origin"] in (ORIGIN, "*")
    body = {"model": "toy", "messages": HELLO, "max_tokens": 2}
    for more, status in (({}, 200), ({"stream": True}, 200), ({"messages": 1}, 400)):
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={**body, **more}, headers=origin, timeout=PATIENCE
        )
        assert answer.status_code == status
        assert answer.headers["Access-Control-Allow-Origin"] in (ORIGIN, "*")
    other = httpx.get(f"{url}/v1/models", headers={"Origin": "http://other"}, timeout=PATIENCE)
    assert other.headers.get("Access-Control-Allow-Origin") not in ("http://other", "*")


def test_small_things_that_clients_ask_for(url: str) -> None:
    for path in ("/health", "/v1/models"):
        head = httpx.head(f"{url}{path}", timeout=PATIENCE)
        assert (head.status_code, head.content) == (200, b"")
    info = httpx.get(f"{url}/tokenizer_info", timeout=PATIENCE).json()
    assert info["chat_template"] == TEMPLATE
    body = {"model": "toy", "messages": HELLO, "max_tokens": 2}
    slashed = post(url, "/v1/chat/completions/", **body)
    assert slashed.status_code == 200, slashed.text
    begun = [*HELLO, {"role": "assistant", "content": "Once upon"}]
    going_on = {"add_generation_prompt": False, "continue_final_message": True}
    tokens = [
        post(url, "/tokenize", model="toy", messages=begun, **more).json()["tokens"]
        for more in (going_on, {})
    ]
    assert tokens[1][: len(tokens[0])] == tokens[0]
    assert len(tokens[0]) < len(tokens[1])
