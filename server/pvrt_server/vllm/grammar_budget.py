"""Requests as vLLM takes them, with grammars that a process which can be killed compiled before.

vLLM does so where nothing ends it: one schema of a kilobyte stopped its engine for good. What
llguidance compiles within its budget may still cost its other backends more.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llguidance import LLMatcher
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pvrt.errors import PvrtError
from pvrt_server.api.exception_handlers import error_response
from pvrt_server.engine.grammar_check import check_grammars
from pvrt_server.engine.text import TextCodec
from pvrt_server.errors import RequestError
from pvrt_server.vllm.habits import as_vllm_takes_it, must_call
from pvrt_server.vllm.list_bounds import bound_lists

#: Characters of all grammars of a request that vLLM compiles, and of a regex or a grammar in words.
#: The time of xgrammar grows by their square: a list of two thousand names takes two seconds, a
#: rule of eight thousand words as many. OpenAI bounds the names of a schema by 120,000.
LONGEST, LONGEST_TEXT = 100_000, 10_000


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
            body = await asyncio.to_thread(_checked, body, scope["path"], self._codec)
        except PvrtError as error:
            await error_response(error)(scope, receive, send)
            return
        read = iter([{"type": "http.request", "body": body, "more_body": False}])
        others = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        scope = {**scope, "headers": [*others, (b"content-length", str(len(body)).encode())]}

        async def again() -> Message:
            return next(read, None) or await receive()

        await self._app(scope, again, send)


def _checked(body: bytes, path: str, codec: Callable[[], TextCodec]) -> bytes:
    """A request's body as vLLM takes it; what is no JSON is vLLM's to refuse. Raises PvrtError."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return body
    bound_lists(given, path, len(body))
    request = as_vllm_takes_it(given, codec)
    found = list(grammars_of(request))
    _bound(found, tools=_holds_calls(request))
    check_grammars(found)
    return body if request is given else json.dumps(request).encode()


def _bound(grammars: Sequence[tuple[str, str]], tools: bool) -> None:
    """Raise RequestError for grammars that are long for what vLLM compiles them with; tools says
    whether it does so with those of tools.
    """
    compiled = [(field, len(grammar)) for field, grammar in grammars if tools or field != "tools"]
    if (length := sum(size for _, size in compiled)) > LONGEST:
        field = max(compiled, key=lambda each: each[1])[0]
        raise RequestError(
            f"{field} cannot be enforced: grammars of this request have {length} characters; the "
            f"most is {LONGEST}",
            field,
        )


def _holds_calls(request: Any) -> bool:
    """Whether calls of tools are held to their schemas."""
    tools = _get(request, "tools")
    return (isinstance(request, dict) and must_call(request)) or any(
        _get(tool, "strict") or _get(tool, "function", "strict")
        for tool in (tools if isinstance(tools, list) else ())
    )


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
    if isinstance(choice := _get(ways, "choice"), list):
        yield from _of_schema("structured_outputs", {"enum": choice})
    for field, tags in {
        "response_format": _get(request, "response_format"),
        "structured_outputs": _parsed(_get(ways, "structural_tag")),
    }.items():
        if _get(tags, "type") == "structural_tag":
            for schema in _schemas_in(tags):
                yield from _of_schema(field, schema)
    tools = _get(request, "tools")
    for tool in tools if isinstance(tools, list) else ():
        yield from _of_schema("tools", _get(tool, "function", "parameters"))
        yield from _of_schema("tools", _get(tool, "parameters"))
    for kind, read in {
        "regex": LLMatcher.grammar_from_regex,
        "grammar": LLMatcher.grammar_from_lark,
    }.items():
        if isinstance(text := _get(ways, kind), str):
            if len(text) > LONGEST_TEXT:
                raise RequestError(
                    f"structured_outputs.{kind} has {len(text)} characters; the most is "
                    f"{LONGEST_TEXT}",
                    "structured_outputs",
                )
            yield "structured_outputs", read(text)


def _of_schema(field: str, schema: Any) -> Iterator[tuple[str, str]]:
    if isinstance(schema, dict):
        schema = json.dumps(schema)
    if isinstance(schema, str):
        try:
            yield field, LLMatcher.grammar_from_json_schema(schema)
        except ValueError:
            return


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return None


def _schemas_in(tags: Any) -> Iterator[Any]:
    """The schemas between tags, which lie at any depth."""
    if isinstance(tags, list):
        for each in tags:
            yield from _schemas_in(each)
    elif isinstance(tags, dict):
        for name, value in tags.items():
            if name in ("schema", "json_schema"):
                yield value
            else:
                yield from _schemas_in(value)


def _get(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
