"""What `server_clients.py` asks of a server, and how it says that an answer is wrong."""

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SECONDS = 120


@dataclass(frozen=True)
class Where:
    """The server under test."""

    url: str
    model: str
    key: str


Feature = tuple[str, Callable[[], None]]


def expect(condition: object, problem: str = "not as expected") -> None:
    """Fail a feature with a reason."""
    if not condition:
        raise AssertionError(problem)


def tokenize(where: Where, text: str, **options: Any) -> list[int]:
    """Token ids of a text, from the server."""
    headers = {"Authorization": f"Bearer {where.key}", "Content-Type": "application/json"}
    body = json.dumps({"model": where.model, "prompt": text, **options}).encode()
    request = urllib.request.Request(f"{where.url}/tokenize", body, headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        ids: list[int] = json.load(response)["tokens"]
    return ids


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": SCHEMA,
        "strict": True,  # else OpenAI promises no arguments of this form either
    },
}
HELLO: Any = [{"role": "user", "content": "Say hello."}]
# Grammars of JSON allow white space, and small models write it without end unless it costs them.
TERSE: dict[str, Any] = {"max_tokens": 200, "frequency_penalty": 2}


def raises(kind: type[Exception], call: Callable[[], Any]) -> Exception:
    """The error of one kind that a call must end in."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")
