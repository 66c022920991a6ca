"""POST /v1/responses: its request as a chat request, and what is kept for the next one."""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, Field, ValidationError

from pvrt_server.api.body import Body
from pvrt_server.api.requests import ChatRequest
from pvrt_server.errors import RequestError

Item = dict[str, Any]
#: Bounds of what is kept in memory for previous_response_id.
MOST_RESPONSES = 1024
MOST_BYTES = 64 << 20

# Fields of chat requests under other names here, and fields of the same name and meaning elsewhere.
_FOREIGN = ("messages", "max_tokens", "max_completion_tokens", "n", "response_format")
# What would change an answer, with the values that ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "top_logprobs": (0,),
}
_HARMLESS = ("truncation", "max_tool_calls", "context_management")
_INCLUDED = ("reasoning.encrypted_content",)  # there is none to hide


class ResponseRequest(Body):
    """The body of POST /v1/responses. What is not listed means what it means for chat."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    input: str | list[Item] = ""
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    tools: list[Item] | None = None
    tool_choice: str | Item | None = None
    text: Item | None = None
    reasoning: Item | None = None
    include: list[str] | None = None

    def items(self) -> list[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            content = [{"type": "input_text", "text": self.input}]
            return [{"type": "message", "role": "user", "content": content}]
        return self.input

    def chat(self, items: Sequence[Item]) -> ChatRequest:
        """The same as a chat request, over all items of the conversation.

        Raises RequestError and RequestValidationError.
        """
        extra = dict(self.model_extra or {})
        for name, nothing in _NOTHING.items():
            value = extra.pop(name, None)
            if value is not None and value not in nothing:
                raise _unsupported(name)
        if wanted := set(self.include or ()) - set(_INCLUDED):
            raise _unsupported(f"include: {min(wanted)}", "include")
        for name in _FOREIGN:
            if extra.get(name) is not None:
                raise RequestError(
                    f"unrecognized request argument: {name}", name, "unknown_parameter"
                )
        extra = {name: value for name, value in extra.items() if name not in _HARMLESS}
        system = [] if self.instructions is None else [_message("system", self.instructions)]
        reasoning, text = self.reasoning or {}, self.text or {}
        given = {
            **extra,
            "model": self.model,
            "messages": [*system, *_messages(items)],
            "max_completion_tokens": self.max_output_tokens,
            "tools": None if self.tools is None else [_tool(tool) for tool in self.tools],
            "tool_choice": _choice(self.tool_choice),
            "response_format": _format(text.get("format")),
            "reasoning_effort": reasoning.get("effort"),
        }
        try:
            return ChatRequest.model_validate(given)
        except ValidationError as error:
            raise RequestValidationError(
                [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            ) from error


def _unsupported(what: str, field: str | None = None) -> RequestError:
    message = f"{what} is not supported by this engine"
    return RequestError(message, field or what, "unsupported_parameter")


def _message(role: str, content: Any) -> Item:
    return {"role": role, "content": content}


def _messages(items: Sequence[Item]) -> Iterator[Item]:
    """Items as messages. Calls and reasoning join the message of the assistant that they are of."""
    said: Item | None = None  # by the assistant, since somebody else spoke
    for place, item in enumerate(items):
        kind = item.get("type") or "message"
        if kind == "function_call_output" or (
            kind == "message" and item.get("role") != "assistant"
        ):
            if said is not None:
                yield said
            said = None
        match kind:
            case "message" if item.get("role") == "assistant":
                if said is not None and said["content"] is not None:
                    yield said
                    said = None
                said = {**(said or {"role": "assistant"}), "content": item.get("content")}
            case "message":
                yield _message(str(item.get("role")), item.get("content"))
            case "function_call":
                said = said or _message("assistant", None)
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                said["tool_calls"] = [*said.get("tool_calls", ()), call]
            case "function_call_output":
                yield {
                    **_message("tool", item.get("output")),
                    "tool_call_id": item.get("call_id"),
                }
            case "reasoning":
                parts = item.get("content") or []
                if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
                    raise RequestError(f"input[{place}].content must be a list of objects", "input")
                texts = [str(part.get("text", "")) for part in parts]
                said = said or _message("assistant", None)
                said |= {"reasoning_content": "".join(texts)} if texts else {}
            case _:
                raise _unsupported(f"input[{place}]: an item of type {kind!r}", "input")
    if said is not None:
        yield said


def _tool(tool: Item) -> Item:
    kind = tool.get("type")
    if kind != "function":
        raise _unsupported(f"a tool of type {kind!r}", "tools")
    return {"type": kind, "function": {key: tool[key] for key in tool if key != "type"}}


def _choice(choice: str | Item | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [_choice(tool) for tool in tools] if isinstance(tools, list) else tools
        allowed = {"mode": choice.get("mode"), "tools": named}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}


def _format(form: Any) -> Any:
    """Of the chat request; what is no object is left to its checks."""
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    schema = {key: value for key, value in form.items() if key != "type"}
    return {"type": "json_schema", "json_schema": schema}


@dataclass(frozen=True)
class Stored:
    """A response, the items that were its input alone, and those of the whole conversation."""

    body: dict[str, Any]
    given: list[Item]
    conversation: list[Item]


class ResponseStore:
    """Responses by id, in memory; the oldest are forgotten where they become too many."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._bytes = 0

    def add(self, stored: Stored) -> None:
        """Keep a response."""
        size = len(json.dumps([stored.body, stored.given]))
        self._stored[stored.body["id"]] = stored, size
        self._bytes += size
        while len(self._stored) > MOST_RESPONSES or self._bytes > MOST_BYTES:
            self._bytes -= self._stored.popitem(last=False)[1][1]

    def get(self, name: str) -> Stored | None:
        """A response, None for one that is not known or forgotten."""
        stored = self._stored.get(name)
        return None if stored is None else stored[0]

    def remove(self, name: str) -> None:
        """Forget a response."""
        self._bytes -= self._stored.pop(name)[1]

    def conversation(self, body: ResponseRequest) -> list[Item]:
        """All items that a request is about: earlier ones, then its own. Raises RequestError."""
        earlier: list[Item] = []
        if body.previous_response_id is not None:
            stored = self.get(body.previous_response_id)
            if stored is None:
                raise RequestError(
                    f"there is no response {body.previous_response_id!r}: it was not stored, or "
                    "was forgotten; send its items as input",
                    "previous_response_id",
                    "previous_response_not_found",
                )
            earlier = stored.conversation
        return [*earlier, *map(self._resolved, body.items())]

    def _resolved(self, item: Item) -> Item:
        """An item, looked up where the client only names it."""
        if item.get("type") != "item_reference":
            return item
        for stored, _ in reversed(self._stored.values()):
            for known in stored.body["output"]:
                if known["id"] == item.get("id"):
                    return dict(known)
        raise RequestError(f"there is no item {item.get('id')!r}", "input", "item_not_found")
