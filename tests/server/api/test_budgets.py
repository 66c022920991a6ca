"""Small requests that ask for much: answered or refused at once, and nobody else waits."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import Server, scripted_engine, serving

COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
#: CPU seconds of this process, client and server together. What was mended took minutes.
SECONDS = 1


@pytest.fixture(scope="module")
def target(toy: Path) -> Iterator[Server]:
    engine, _ = scripted_engine(toy, "one")
    with serving(engine) as running:
        yield running


MANY = 200_000
HELLO = {"role": "user", "content": "a"}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "numbers and a word": (COMPLETIONS, {"prompt": [*range(MANY), "a"]}),
    "words and a number": (COMPLETIONS, {"prompt": ["a"] * MANY + [1]}),
    "truths": (COMPLETIONS, {"prompt": [True] * MANY}),
    "lists of words": (COMPLETIONS, {"prompt": [["a"] * MANY]}),
    "nothings": (COMPLETIONS, {"prompt": [None] * MANY}),
    "many prompts": (COMPLETIONS, {"prompt": ["a b c"] * MANY}),
    "many prompts of many answers": (COMPLETIONS, {"prompt": ["a b c"] * 2000, "n": 100}),
    "empty messages": (CHAT, {"messages": [{}] * MANY}),
    "messages of no kind": (CHAT, {"messages": [1] * MANY}),
    "parts of no kind": (CHAT, {"messages": [{"role": "user", "content": [1] * MANY}]}),
    "calls of no kind": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [1] * MANY}]}),
    "tools of no kind": (CHAT, {"messages": [HELLO], "tools": [{}] * MANY}),
    "stops of no kind": (COMPLETIONS, {"prompt": "a", "stop": [1] * MANY}),
    "biases of no kind": (
        COMPLETIONS,
        {"prompt": "a", "logit_bias": {str(i): "b" for i in range(MANY)}},
    ),
    "unknown fields": (TOKENIZE, {str(i): 1 for i in range(MANY)}),
    "unknown fields of a format": (
        COMPLETIONS,
        {"prompt": "a", "response_format": {"type": "text", **{str(i): 1 for i in range(MANY)}}},
    ),
    "tokens of no kind": ("/detokenize", {"tokens": ["a"] * MANY}),
    "a long name": (COMPLETIONS, {"prompt": "a", "model": "m" * 1_000_000}),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_refusal_costs_no_more_than_its_first_reason(target: Server, name: str) -> None:
    path, body = BODIES[name]
    content = json.dumps(body).encode()
    started = time.process_time()
    answer = target.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    assert len(answer.content) < 3000
    assert time.process_time() - started < SECONDS


def pattern(letter: str) -> dict[str, Any]:
    return {"type": "string", "pattern": f".*{letter}.{{20}}{letter}.*"}


BOMB = {"type": "string", "allOf": [pattern(chr(97 + i)) for i in range(20)]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "patterns together": BOMB,
    "patterns of a field": {"type": "object", "properties": {"a": BOMB}, "required": ["a"]},
    "a million items": {"type": "array", "items": {}, "minItems": 10**6, "maxItems": 10**7},
    "itself": {"$ref": "#"},
    "each other": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "$ref": "#/$defs/a",
    },
    "a megabyte": {"enum": ["x" * 2_000_000]},
}


@pytest.mark.usefixtures("short_check")
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_without_end_is_refused(target: Server, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}}
    started = time.process_time()
    answer = target.post(COMPLETIONS, {"prompt": "a", "response_format": form})
    assert answer.status_code == 400 and "cannot be enforced" in answer.text
    assert len(answer.content) < 3000
    assert time.process_time() - started < SECONDS
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMAS[name]}}
    tools = {"messages": [HELLO], "tools": [tool], "tool_choice": "required"}
    assert target.post(CHAT, tools).status_code == 400
