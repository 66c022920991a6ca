"""What the server answers: OpenAI's bodies, chunks and errors, built from engine events.

Whole bodies carry the nulls that the specification requires; deltas leave them out.
"""

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from pvrt_server.api.reasoning import ReasoningStream, Thought
from pvrt_server.api.tool_stream import CallDelta, ToolStream
from pvrt_server.api.tools import Tools
from pvrt_server.engine.sampling import TokenLogprob
from pvrt_server.engine.sequences import PromptEvent, TokenEvent
from pvrt_server.engine.text import TextCodec

DONE = b"data: [DONE]\n\n"
_LONGEST = 1000  # characters of an error
KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True)
class ScoredToken:
    """A token to report. `offset` is where it starts in the text, in characters.

    `score` is None for the first token of a prompt, which nothing predicts.
    """

    token_id: int
    offset: int
    score: TokenLogprob | None


@dataclass(frozen=True)
class Delta:
    """Part of one choice: reasoning, text, tool calls, its end, and the tokens if asked for."""

    index: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    calls: tuple[CallDelta, ...] = ()
    reasoning: str = ""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.text or self.reasoning or self.tokens or self.finish_reason or self.calls)


#: Where a stream tells its usage: nowhere, in a last chunk, or in every chunk.
UsageInStream = Literal["nowhere", "at the end", "everywhere"]


@dataclass
class Usage:
    """Token counts of a request with a number of choices per prompt."""

    prompt_tokens: int
    choices: int = 1
    in_stream: UsageInStream = "nowhere"
    completion_tokens: int = 0
    cached_tokens: int = 0

    def count(self, event: PromptEvent | TokenEvent) -> None:
        """Add an event of any choice."""
        if isinstance(event, TokenEvent):
            self.completion_tokens += 1
        elif event.index % self.choices == 0:  # a prompt counts once
            self.cached_tokens += event.cached

    def of_chunk(self) -> dict[str, Any]:
        """The field that a chunk has: null up to the last, where only the last has usage."""
        if self.in_stream == "nowhere":
            return {}
        return {"usage": self.body() if self.in_stream == "everywhere" else None}

    def body(self) -> dict[str, Any]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Header:
    """The fields that all bodies of one answer share."""

    model: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A body or chunk of type `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": None,
            **more,
        }


def new_header(model: str, prefix: str) -> Header:
    """A header with a fresh id."""
    return Header(model, f"{prefix}-{uuid.uuid4().hex}")


class Serializer(Protocol):
    """How one endpoint writes deltas."""

    prefix: str
    kind: str
    chunk_kind: str
    prompt_field: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first choice of a stream, before any delta; None where there is no such thing."""

    def deltas(self, event: PromptEvent | TokenEvent) -> Iterable[Delta]:
        """What an event adds to the answer."""

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """A choice of a streamed chunk."""

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A choice of a whole body; the delta holds all of it."""


@dataclass(frozen=True)
class Echo:
    """A prompt to repeat before the answer."""

    text: str
    token_ids: tuple[int, ...]


class CompletionSerializer:
    """/v1/completions. `echoes` has one entry per choice, None where nothing is repeated."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"
    prompt_field = "prompt"

    def __init__(self, codec: TextCodec, echoes: Sequence[Echo | None], logprobs: bool) -> None:
        self._codec = codec
        self._echoes = echoes
        self._logprobs = logprobs

    def opening(self, index: int) -> None:
        """See Serializer."""

    def deltas(self, event: PromptEvent | TokenEvent) -> Iterable[Delta]:
        """See Serializer."""
        echo = self._echoes[event.index]
        if isinstance(event, PromptEvent):
            if echo is not None:
                tokens = _prompt_tokens(self._codec, echo, event.logprobs)
                yield Delta(event.index, echo.text, tokens, event.finish_reason)
            return
        shift = len(echo.text) if echo else 0
        yield _token_delta(event, shift)

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """See Serializer."""
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._scores(delta.tokens) if self._logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    choice = chunk

    def _scores(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            top: dict[str, float] = {}
            if token.score is not None:
                # Chosen last: this endpoint lists it even when it is not among the likeliest.
                pairs = [*token.score.top, (token.token_id, token.score.logprob)]
                for token_id, logprob in pairs:
                    top.setdefault(self._name(token_id), logprob)
            tops.append(top if token.score is not None else None)
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [token.score and token.score.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }

    def _name(self, token_id: int) -> str:
        """A token as a key: parts of characters by their bytes, so that they stay apart."""
        raw = self._codec.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatSerializer:
    """/v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prompt_field = "messages"

    def __init__(
        self, codec: TextCodec, logprobs: bool, tools: Tools | None, thought: Thought
    ) -> None:
        self._codec = codec
        self._logprobs = logprobs
        self._tools = tools
        self._streams: dict[int, ToolStream] = {}
        self._thoughts = defaultdict[int, ReasoningStream](lambda: ReasoningStream(thought))

    def opening(self, index: int) -> dict[str, Any]:
        """See Serializer; says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def deltas(self, event: PromptEvent | TokenEvent) -> Iterable[Delta]:
        """See Serializer."""
        if not isinstance(event, TokenEvent):
            return
        delta = _token_delta(event, 0)
        last = event.finish_reason is not None
        reasoning, text = self._thoughts[event.index].push(delta.text, last)
        delta = replace(delta, text=text, reasoning=reasoning)
        if self._tools is not None:
            stream = self._streams.setdefault(event.index, ToolStream(self._tools))
            delta = _with_calls(delta, stream)
        yield delta

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """See Serializer."""
        news: dict[str, Any] = {"content": delta.text} if delta.text else {}
        news |= _reasoning_fields(delta)
        if delta.calls:
            news["tool_calls"] = _call_entries(delta.calls)
        return {
            "index": delta.index,
            "delta": news,
            "logprobs": self._scores(delta.tokens),
            "finish_reason": delta.finish_reason,
        }

    def choice(self, delta: Delta) -> dict[str, Any]:
        """See Serializer."""
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        message |= _reasoning_fields(delta)
        if delta.calls:
            message["content"] = delta.text or None
            calls = _call_entries(delta.calls)
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"} for call in calls
            ]
        return {
            "index": delta.index,
            "message": message,
            "logprobs": self._scores(delta.tokens),
            "finish_reason": delta.finish_reason,
        }

    def _scores(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {
                **self._entry(token.token_id, token.score.logprob),
                "top_logprobs": [self._entry(*pair) for pair in token.score.top],
            }
            for token in tokens
            if token.score is not None
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._codec.token_text(token_id),
            "bytes": list(self._codec.token_bytes(token_id)),
            "logprob": logprob,
        }


def merge(deltas: Sequence[Delta]) -> Delta:
    """The deltas of one choice, in order, as one."""
    return Delta(
        deltas[0].index,
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.tokens),
        deltas[-1].finish_reason,
        tuple(call for delta in deltas for call in delta.calls),
        "".join(delta.reasoning for delta in deltas),
    )


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error envelope. A message may quote what was sent, and is cut where it is long."""
    message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sse(body: dict[str, Any]) -> bytes:
    """One server-sent event.

    ASCII only: some clients also split lines at U+2028 and its like.
    """
    return b"data: " + json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n\n"


def _with_calls(delta: Delta, stream: ToolStream) -> Delta:
    """A delta whose text has been taken apart into content and calls."""
    parts = list(stream.push(delta.text))
    reason = delta.finish_reason
    if reason is not None:
        parts += stream.flush()
        if reason == "stop" and stream.calls:
            reason = "tool_calls"
    text = "".join(part for part in parts if isinstance(part, str))
    calls = tuple(part for part in parts if isinstance(part, CallDelta))
    return replace(delta, text=text, finish_reason=reason, calls=calls)


def _reasoning_fields(delta: Delta) -> dict[str, str]:
    """Reasoning under both names that clients read: DeepSeek's, and OpenRouter's and vLLM's."""
    if not delta.reasoning:
        return {}
    return {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}


def _call_entries(deltas: Iterable[CallDelta]) -> list[dict[str, Any]]:
    """`tool_calls`: one entry per call; the first part of a call brings its id and name."""
    entries: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.name is not None:
            entries[delta.number] = {
                "index": delta.number,
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": delta.name, "arguments": ""},
            }
        empty = {"index": delta.number, "function": {"arguments": ""}}
        entry = entries.setdefault(delta.number, empty)
        entry["function"]["arguments"] += delta.arguments
    return list(entries.values())


def _token_delta(event: TokenEvent, shift: int) -> Delta:
    tokens: tuple[ScoredToken, ...] = ()
    if event.logprob is not None:
        tokens = (ScoredToken(event.token_id, event.offset + shift, event.logprob),)
    return Delta(event.index, event.text, tokens, event.finish_reason)


def _prompt_tokens(
    codec: TextCodec, echo: Echo, scores: Sequence[TokenLogprob | None]
) -> tuple[ScoredToken, ...]:
    if not scores:
        return ()
    stream = codec.stream()
    tokens = []
    for token_id, score in zip(echo.token_ids, scores, strict=True):
        tokens.append(ScoredToken(token_id, stream.length, score))
        stream.push(token_id)
    return tuple(tokens)
