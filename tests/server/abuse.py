"""Requests that ask for much: each is answered or refused at once, and nobody else waits.

A request is a path and a body. REFUSED are those that the embedded engine must refuse, LARGE those
that it may answer, SCHEMAS those that no answer can be held to within reason. TRICKS are done with
connections, and take the address of a server.
"""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

#: CPU seconds of a server that none of them may take.
CPU_SECONDS = 5.0
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
TOKENIZE = "/tokenize"
MANY = 200_000
HELLO = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def _tool(number: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {f"p{number}": {"type": "string"}}}
    return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}


Request = tuple[str, dict[str, Any]]
REFUSED: dict[str, Request] = {
    "numbers and a word": (COMPLETIONS, {"prompt": [*range(MANY), "a"]}),
    "words and a number": (COMPLETIONS, {"prompt": ["a"] * MANY + [1]}),
    "truths": (COMPLETIONS, {"prompt": [True] * MANY}),
    "lists of words": (COMPLETIONS, {"prompt": [["a"] * MANY]}),
    "lists of lists": (COMPLETIONS, {"prompt": [[[1]]] * MANY}),
    "numbers and lists": (COMPLETIONS, {"prompt": [1, [1]] * (MANY // 2)}),
    "nothings": (COMPLETIONS, {"prompt": [None] * MANY}),
    "many prompts": (COMPLETIONS, {"prompt": ["a b c"] * MANY}),
    "many prompts of many answers": (COMPLETIONS, {"prompt": ["a b c"] * 2000, "n": 100}),
    "a long prompt": (COMPLETIONS, {"prompt": "a " * 2_500_000}),
    "many tokens": (COMPLETIONS, {"prompt": [1] * 1_000_000}),
    "a token of no model": (COMPLETIONS, {"prompt": [10**9]}),
    "answers without number": (COMPLETIONS, {"prompt": "a", "n": 10**9}),
    "tokens without number": (COMPLETIONS, {"prompt": "a", "max_tokens": 10**12}),
    "scores without number": (COMPLETIONS, {"prompt": "a", "logprobs": 10**9}),
    "empty messages": (CHAT, {"messages": [{}] * MANY}),
    "messages of no kind": (CHAT, {"messages": [1] * MANY}),
    "many messages": (CHAT, {"messages": [HELLO] * 50_000}),
    "a long message": (CHAT, {"messages": [{"role": "user", "content": "a " * 2_500_000}]}),
    "parts of no kind": (CHAT, {"messages": [{"role": "user", "content": [1] * MANY}]}),
    "calls of no kind": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [1] * MANY}]}),
    "many tools": (CHAT, {"messages": [HELLO], "tools": [TOOL] * 20_000, "max_tokens": 2}),
    "tools of no kind": (CHAT, {"messages": [HELLO], "tools": [{}] * MANY}),
    "stops of no kind": (COMPLETIONS, {"prompt": "a", "stop": [1] * MANY}),
    "many stops": (COMPLETIONS, {"prompt": "a", "stop": ["x" * 50] * 3000}),
    "biases of no kind": (
        COMPLETIONS,
        {"prompt": "a", "logit_bias": {str(i): "b" for i in range(MANY)}},
    ),
    "many biases": (COMPLETIONS, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(MANY)}}),
    "unknown fields": (TOKENIZE, {str(i): 1 for i in range(MANY)}),
    "unknown fields of a format": (
        COMPLETIONS,
        {"prompt": "a", "response_format": {"type": "text", **{str(i): 1 for i in range(MANY)}}},
    ),
    "tokens of no kind": ("/detokenize", {"tokens": ["a"] * MANY}),
    "a long name": (COMPLETIONS, {"prompt": "a", "model": "m" * 1_000_000}),
    "inputs of no kind": (RESPONSES, {"input": [1] * MANY}),
    "empty inputs": (RESPONSES, {"input": [{}] * MANY}),
    "many inputs": (RESPONSES, {"input": [HELLO] * 50_000}),
    "a template of its own": (
        CHAT,
        {"messages": [HELLO], "chat_template": "{% for i in range(10**10) %}{% endfor %}"},
    ),
}
LARGE: dict[str, Request] = {
    "a long stop": (COMPLETIONS, {"prompt": "a", "stop": "x" * 1_000_000, "max_tokens": 2}),
    "many parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}] * MANY}]}),
    "tools of many kinds": (
        CHAT,
        {"messages": [HELLO], "tools": [_tool(i) for i in range(2000)], "max_tokens": 2},
    ),
    "text to tokenize": (TOKENIZE, {"prompt": "a " * 500_000}),
    "tokens to read": ("/detokenize", {"tokens": [1] * 500_000}),
    "what a template is told": (
        CHAT,
        {"messages": [HELLO], "chat_template_kwargs": {f"k{i}": i for i in range(MANY)}},
    ),
    "tokens to stop at": (COMPLETIONS, {"prompt": "a", "stop_token_ids": [1] * MANY}),
    "bad words": (COMPLETIONS, {"prompt": "a", "bad_words": ["a"] * MANY}),
    "allowed tokens": (COMPLETIONS, {"prompt": "a", "allowed_token_ids": [1] * MANY}),
    "metadata": (COMPLETIONS, {"prompt": "a", "metadata": {str(i): "x" for i in range(MANY)}}),
}


def pattern(letter: str) -> dict[str, Any]:
    """Whose automaton has a million states."""
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


#: Nothing is wrong with these but their length.
LONG_SCHEMAS: dict[str, dict[str, Any]] = {
    "a long enum": {"enum": [f"{i:050d}" for i in range(15_000)]},
    "many branches": {
        "anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(15_000)]
    },
}


def _of_schema(name: str, schema: dict[str, Any]) -> Iterator[tuple[str, Request]]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    yield f"{name}: format", (COMPLETIONS, {"prompt": "a", "response_format": form})
    must = {"messages": [HELLO], "tools": [tool], "tool_choice": "required"}
    yield f"{name}: tool", (CHAT, must)
    yield f"{name}: text", (RESPONSES, {"input": "a", "text": text})
    outputs = {"prompt": "a", "structured_outputs": {"json": schema}}
    yield f"{name}: vLLM's own", (COMPLETIONS, outputs)
    tags = {
        "type": "structural_tag",
        "structures": [{"begin": "<a>", "schema": schema, "end": "</a>"}],
        "triggers": ["<a>"],
    }
    yield f"{name}: tags", (CHAT, {"messages": [HELLO], "response_format": tags})


#: Every schema in every place that a request has for one, and grammars of other kinds.
GRAMMARS: dict[str, Request] = {
    **{
        key: each
        for name, schema in (SCHEMAS | LONG_SCHEMAS).items()
        for key, each in _of_schema(name, schema)
    },
    **{
        name: (COMPLETIONS, {"prompt": "a", "structured_outputs": {kind: grammar}})
        for name, kind, grammar in (
            ("a deep regex", "regex", "(" * 200 + "a" + "{1,1000})" * 200),
            ("a wide regex", "regex", ".*a.{500}" * 50),
            ("a long grammar", "grammar", "start: " + "a " * 100_000 + '\na: "a"'),
            ("a grammar in itself", "grammar", "start: start"),
            ("many choices", "choice", ["a" * 100] * 50_000),
        )
    },
}


def everything() -> dict[str, Request]:
    """All requests by name."""
    return {**REFUSED, **LARGE, **GRAMMARS}


def _connected(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port or 0), timeout=60)


def _posted(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _left(url: str, body: dict[str, Any], clients: int) -> None:
    """Clients ask for a stream, and go after its first bytes."""
    for _ in range(clients):
        with _connected(url) as connection:
            connection.sendall(_posted(COMPLETIONS, body))
            connection.recv(100)


def _cancelled(url: str) -> None:
    _left(url, {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}, 20)


def _cancelled_at_once(url: str) -> None:
    """A client goes while its grammar, which nobody asked for before, is checked."""
    schema = {"anyOf": [BOMB, {"const": "left"}]}
    ((_, (path, body)), *_) = _of_schema("left", schema)
    with _connected(url) as connection:
        connection.sendall(_posted(path, body))


def _half_open(url: str) -> None:
    """Two hundred connections with half a request, held while another one asks."""
    open_now = [_connected(url) for _ in range(200)]
    for connection in open_now:
        connection.sendall(_posted(COMPLETIONS, {"prompt": "a"})[:60])
    with _connected(url) as last:
        last.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b" 200 " in last.recv(100)
    for connection in open_now:
        connection.close()


def _pipelined(url: str) -> None:
    """Five hundred requests at once, of which no answer is read."""
    with _connected(url) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)


def _flooded(url: str) -> None:
    """A megabyte of headers."""
    with _connected(url) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"X-Y: z\r\n" * 130_000)
        except ConnectionError:  # it was closed in the middle, as it should be
            return


#: What is done, and over how many requests its cost is spread.
TRICKS: dict[str, tuple[Callable[[str], None], int]] = {
    "clients that leave": (_cancelled, 20),
    "a client that leaves its grammar": (_cancelled_at_once, 1),
    "half-open connections": (_half_open, 200),
    "requests without readers": (_pipelined, 500),
    "a megabyte of headers": (_flooded, 1),
}
