"""Harmless habits of clients that vLLM answers with 400 and the embedded engine does not."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from llguidance import LLMatcher

from pvrt.errors import ServeError
from pvrt_server.api.requests import check_gap
from pvrt_server.engine.grammar import check_schema
from pvrt_server.engine.grammar_check import check_grammar
from pvrt_server.engine.json_schema import enforceable, mapped
from pvrt_server.engine.text import TextCodec
from pvrt_server.notices import say_once

Json = dict[str, Any]
# What xgrammar does not know, by vLLM's own list. vLLM would take llguidance for it, and then for
# all that comes later, because it has one library for the life of its engine: calls of tools, which
# need xgrammar, would be errors from then on.
_UNKNOWN = frozenset(
    {"multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames"}
)
_FORMATS = frozenset(
    {
        *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid"),
        *("uri", "uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
    }
)


def as_vllm_takes_it(request: Any, codec: Callable[[], TextCodec]) -> Any:
    """A request of the same meaning without what vLLM refuses; the same object where there is none.

    - `tools: []`, and its tool_choice
    - stream_options of what is no stream
    - arguments of earlier calls as an object, not as its text
    - schemas with what its grammars cannot enforce: that is left to the model, and the log says so
    - a suffix, which vLLM knows of one model: it becomes token ids of the prompt. codec, the
      model's tokenizer, is asked for then, and for tools

    Tools that must be called become strict, as they are on the embedded engine: vLLM promises no
    arguments of their schema otherwise. Where the chat template refuses two calls in one message,
    one call is asked for.

    Raises RequestError for a schema that costs too much, for one of a tool that must be called and
    cannot be held to, and for a suffix that the model has no tokens for.
    """
    if not isinstance(request, dict):
        return request
    changes = dict(_changes(request, codec))
    kept = {key: value for key, value in {**request, **changes}.items() if value is not None}
    return kept if changes else request


def _changes(request: Json, codec: Callable[[], TextCodec]) -> Iterator[tuple[str, Any]]:
    """Fields and their new values, None for fields that go."""
    tools = request.get("tools")
    if tools == []:
        yield from (("tools", None), ("tool_choice", None))
    elif isinstance(tools, list):
        if must_call(request):
            yield "tools", [_strict(tool) for tool in tools]
        if request.get("parallel_tool_calls") is not False and _takes_one_call(codec):
            yield "parallel_tool_calls", False
    if request.get("stream_options") is not None and not request.get("stream"):
        yield "stream_options", None
    if "prompt" in request and isinstance(suffix := request.get("suffix"), str):
        yield "suffix", None
        if suffix:
            check_gap(prompt := request["prompt"], request.get("echo"))
            yield "prompt", codec().encode_gap(prompt, suffix)
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


def must_call(request: Json) -> bool:
    """Whether the answer has to be a call of a tool."""
    return request.get("tool_choice") not in (None, "auto", "none")


def _takes_one_call(codec: Callable[[], TextCodec]) -> bool:
    try:
        return codec().chat.one_call_a_turn
    except ServeError:  # vLLM may know a way of its own
        return False


def _strict(tool: Any) -> Any:
    """A tool whose arguments vLLM holds to its schema. That is checked here, where errors name the
    tool; vLLM's own do not."""
    if not isinstance(tool, dict):
        return tool
    nested = isinstance(tool.get("function"), dict)
    function = tool["function"] if nested else tool
    if nested or "parameters" in tool:
        if isinstance(parameters := function.get("parameters"), dict):
            check_schema(parameters, "tools", f"tools: the schema of {function.get('name')!r}")
        function = {**function, "strict": function.get("strict", True)}
    return {**tool, "function": function} if nested else function


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
        check_grammar(LLMatcher.grammar_from_json_schema(given), field)
        ready, notes = enforceable(given)
        ready = _for_xgrammar(ready, notes)
    except (ValueError, RecursionError):  # it is no schema
        return given
    for note in notes:
        say_once(f"not enforced in {field}: {note}")
    return ready if notes else given


def _for_xgrammar(node: Json, notes: list[str]) -> Json:
    """A schema without what vLLM refuses xgrammar."""
    node = mapped(node, lambda part: _for_xgrammar(part, notes))
    for key in [key for key in node if _is_refused(node, key)]:
        notes.append(f"{key} {node.pop(key)!r}"[:200])
    return node


def _is_refused(node: Json, key: str) -> bool:
    match key:
        case "format":
            return node[key] not in _FORMATS
        case "minLength" | "maxLength":
            return "pattern" in node or node.get("format") in _FORMATS
        case "patternProperties":
            return "properties" in node or len(node[key]) > 1
        case _:
            return key in _UNKNOWN
