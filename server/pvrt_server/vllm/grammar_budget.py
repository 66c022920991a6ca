"""Grammars of requests to vLLM, compiled by a process that can be killed before vLLM compiles them.

vLLM does so where nothing ends it: one schema of a kilobyte stopped its engine for good. What
llguidance compiles within its budget may still cost its other backends more.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pvrt.errors import PvrtError
from pvrt_server.api.exception_handlers import error_response
from pvrt_server.engine.grammar_check import check_grammar


class GrammarBudget:
    """ASGI middleware that answers 400 to requests whose grammars cost too much."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
            for field, grammar in grammars_of(body):
                await asyncio.to_thread(check_grammar, grammar, field)
        except PvrtError as error:
            await error_response(error)(scope, receive, send)
            return
        read = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(read, None) or await receive()

        await self._app(scope, again, send)


def grammars_of(body: bytes) -> Iterator[tuple[str, str]]:
    """The grammars of a request's body and the fields that they are in; none in what is no JSON.

    What is wrong with them is left to vLLM's own errors.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return
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
