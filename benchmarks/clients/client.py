"""What all clients are asked through: OpenAI's names for options in, one form of answers out."""

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SECONDS = 120
HELLO: Any = [{"role": "user", "content": "Say hello."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Weather of a city", "parameters": SCHEMA}
#: strict, for else OpenAI promises no arguments of this form either.
TOOL = {"type": "function", "function": {**FUNCTION, "strict": True}}
CHOICE = {"type": "function", "function": {"name": "weather"}}
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
#: The same for /v1/responses.
FLAT_TOOL = {"type": "function", **FUNCTION, "strict": True}
FLAT_CHOICE = {"type": "function", "name": "weather"}
FLAT_FORM = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}


@dataclass(frozen=True)
class Where:
    """The server under test."""

    url: str
    model: str
    key: str

    @property
    def api(self) -> str:
        """Where the API begins."""
        return f"{self.url}/v1"

    def tokenize(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text, from the server."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        body = json.dumps({"model": self.model, "prompt": text, **options}).encode()
        request = urllib.request.Request(f"{self.url}/tokenize", body, headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            ids: list[int] = json.load(response)["tokens"]
        return ids


@dataclass(frozen=True)
class Answer:
    """One choice. calls are (name, arguments as JSON); scores (token, logprob)."""

    text: str
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str | None = None
    total_tokens: int | None = None
    scores: list[tuple[str, float | None]] = field(default_factory=list)
    id: str | None = None


Answers = Callable[..., list[Answer]]


class Client:
    """A client library. What a library has not stays None, and is not asked.

    Options have OpenAI's names. chat takes messages, complete a prompt, respond the input of
    /v1/responses; their streams give the same answers, joined.
    """

    distribution: str  # whose version the results name
    #: Features that the library has no way to ask for.
    lacks: frozenset[str] = frozenset()
    models: Callable[[], list[str]] | None = None
    chat: Answers | None = None
    chat_stream: Answers | None = None
    chat_async: Answers | None = None
    complete: Answers | None = None
    complete_stream: Answers | None = None
    respond: Answers | None = None
    respond_stream: Answers | None = None
    #: (api, streamed): the text after a tool was called and its result told.
    agent: Callable[[str, bool], str] | None = None
    #: (api): what a library makes of a schema of its own, as JSON.
    structured: Callable[[str], Any] | None = None
    #: Several questions in one call; how many answers came.
    batch: Callable[[list[str]], int] | None = None
    #: Open a stream of chat, take a piece and leave.
    leave: Callable[[], None] | None = None

    def __init__(self, where: Where) -> None:
        self.where = where

    def version(self) -> str:
        """The library's version."""
        import importlib.metadata

        return importlib.metadata.version(self.distribution)

    def close(self) -> None:
        """Let go of what it holds."""


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind a library's error, however it is wrapped."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        status = getattr(error, "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def joined(parts: list[Answer]) -> list[Answer]:
    """The answer that the pieces of a stream make up."""
    finishes = [part.finish for part in parts if part.finish]
    totals = [part.total_tokens for part in parts if part.total_tokens]
    return [
        Answer(
            "".join(part.text for part in parts),
            [call for part in parts for call in part.calls],
            finishes[-1] if finishes else None,
            totals[-1] if totals else None,
            [score for part in parts for score in part.scores],
        )
    ]
