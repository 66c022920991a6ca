"""Harmless habits of clients that vLLM answers with 400 and the embedded engine does not."""

import json
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher

from pvrt_server.engine.grammar_check import check_grammar
from pvrt_server.engine.json_schema import enforceable
from pvrt_server.notices import say_once

Json = dict[str, Any]
#: llguidance, to which vLLM leaves what xgrammar does not know, reads this in a schema.
_LENIENT = {"lenient": True, "coerce_one_of": True}


def as_vllm_takes_it(request: Any) -> Any:
    """A request of the same meaning without what vLLM refuses; the same object where there is none.

    - `tools: []`, and its tool_choice
    - stream_options of what is no stream
    - arguments of earlier calls as an object, not as its text
    - schemas with what no grammar can enforce: that is left to the model, and the log says so

    Raises RequestError for a schema that costs too much.
    """
    if not isinstance(request, dict):
        return request
    changes = dict(_changes(request))
    kept = {key: value for key, value in {**request, **changes}.items() if value is not None}
    return kept if changes else request


def _changes(request: Json) -> Iterator[tuple[str, Any]]:
    """Fields and their new values, None for fields that go."""
    if request.get("tools") == []:
        yield from (("tools", None), ("tool_choice", None))
    if request.get("stream_options") is not None and not request.get("stream"):
        yield "stream_options", None
    messages = request.get("messages")
    if isinstance(messages, list) and messages != (told := [_told(m) for m in messages]):
        yield "messages", told
    for field, path in {
        "response_format": ("json_schema", "schema"),
        "text": ("format", "schema"),
        "structured_outputs": ("json",),
    }.items():
        given = request.get(field)
        if given != (known := _with_schema(given, path, field)):
            yield field, known


def _told(message: Any) -> Any:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_called(call) for call in calls]}


def _called(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    arguments = json.dumps(function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}}


def _with_schema(given: Any, path: tuple[str, ...], field: str) -> Any:
    if not isinstance(given, dict):
        return given
    if path:
        inner = given.get(path[0])
        known = _with_schema(inner, path[1:], field)
        return given if known is inner else {**given, path[0]: known}
    try:
        problem = _problem(given, field)
        if not problem:
            return given
        ready, notes = enforceable(given)
        ready = {**ready, "x-guidance": _LENIENT}
        if _problem(ready, field):
            return given  # vLLM says what is wrong
    except (ValueError, RecursionError):  # it is no schema
        return given
    for note in notes or [" ".join(problem.split())]:
        say_once(f"not enforced in {field}: {note}")
    return ready


def _problem(schema: Json, field: str) -> str:
    """Why llguidance refuses a schema, empty where it does not. Raises RequestError for one that
    costs too much to find out."""
    grammar = LLMatcher.grammar_from_json_schema(schema)
    check_grammar(grammar, field)
    return LLMatcher.validate_grammar(grammar)
