"""Requests as vLLM takes them, with grammars that a process which can be killed compiled before.

vLLM does so where nothing ends it: one schema of a kilobyte stopped its engine for good. What
llguidance compiles within its budget may still cost its other backends more.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

from llguidance import LLMatcher
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pvrt.errors import PvrtError
from pvrt_server.api.exception_handlers import error_response
from pvrt_server.engine.grammar_check import check_grammar
from pvrt_server.engine.text import TextCodec
from pvrt_server.vllm.habits import as_vllm_takes_it


class GrammarBudget:
    """ASGI middleware that answers 400 to requests whose grammars cost too much.

    codec gives the model's tokenizer, for `habits`.
    """

    def __init__(self, app: ASGIApp, codec: Callable[[], TextCodec]) -> None:
        self._app, self._codec = app, codec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            body = await asyncio.to_thread(_checked, body, self._codec)
        except PvrtError as error:
            await error_response(error)(scope, receive, send)
            return
        read = iter([{"type": "http.request", "body": body, "more_body": False}])
        others = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        scope = {**scope, "headers": [*others, (b"content-length", str(len(body)).encode())]}

        async def again() -> Message:
            return next(read, None) or await receive()

        await self._app(scope, again, send)


def _checked(body: bytes, codec: Callable[[], TextCodec]) -> bytes:
    """A request's body as vLLM takes it; what is no JSON is vLLM's to refuse. Raises PvrtError."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return body
    request = as_vllm_takes_it(given, codec)
    for field, grammar in grammars_of(request):
        check_grammar(grammar, field)
    return body if request is given else json.dumps(request).encode()


def grammars_of(request: Any) -> Iterator[tuple[str, str]]:
    """The grammars of a request and the fields that they are in.

    What is wrong with them is left to vLLM's own errors.
    """
    ways = _get(request, "structured_outputs")
    for field, schema in {
        "response_format": _get(request, "response_format", "json_schema", "schema"),
        "text": _get(request, "text", "format", "schema"),
        "structured_outputs": _get(ways, "json"),
    }.items():
        yield from _of_schema(field, schema)
    tools = _get(request, "tools")
    for tool in tools if isinstance(tools, list) else ():
        yield from _of_schema("tools", _get(tool, "function", "parameters"))
        yield from _of_schema("tools", _get(tool, "parameters"))
    if isinstance(regex := _get(ways, "regex"), str):
        yield "structured_outputs", LLMatcher.grammar_from_regex(regex)
    if isinstance(grammar := _get(ways, "grammar"), str):
        yield "structured_outputs", LLMatcher.grammar_from_lark(grammar)


def _of_schema(field: str, schema: Any) -> Iterator[tuple[str, str]]:
    if isinstance(schema, dict):
        schema = json.dumps(schema)
    if isinstance(schema, str):
        try:
            yield field, LLMatcher.grammar_from_json_schema(schema)
        except ValueError:
            return


def _get(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
