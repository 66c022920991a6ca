"""The messages of a conversation: from a request to what chat templates expect."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from pvrt_server.api.body import Body
from pvrt_server.errors import RequestError
from pvrt_server.notices import say_once

# Keys that templates read. Clients keep many more with their messages.
_FOR_TEMPLATES = ("name", "reasoning_content")
# Keys that would change an answer if they did what they say.
_WANTED = ("function_call", "prefix")
# Types of parts, and the field that holds the text; thoughts of earlier turns are not read again.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning")


_JSON: TypeAdapter[Any] = TypeAdapter(Any)


class CalledFunction(Body):
    """`tool_calls[i].function` of a message."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str | dict[str, Any] | None = None

    def for_template(self) -> dict[str, Any]:
        """With arguments as an object: of a call that max_tokens cut, what is there of it."""
        arguments: Any = self.arguments
        if isinstance(arguments, str):
            try:
                arguments = _JSON.validate_json(
                    arguments, experimental_allow_partial="trailing-strings"
                )
            except ValueError:
                arguments = None
        return {"name": self.name, "arguments": arguments if isinstance(arguments, dict) else {}}


class ToolCall(Body):
    """`tool_calls[i]` of a message."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self, where: str, tools: bool) -> dict[str, Any]:
        """The message as chat templates expect it: text content, no developer role.

        `where` names the message in errors, tools says whether the template knows tools. Raises
        RequestError for images and the like.
        """
        kept: dict[str, Any] = {}
        for name, value in (self.model_extra or {}).items():
            if value and name in _WANTED:
                raise _unsupported(f"{where}.{name}")
            if name in _FOR_TEMPLATES:
                kept |= {} if value is None else {name: value}
            elif name == "reasoning":  # vLLM's and OpenRouter's name for it
                kept |= {"reasoning_content": value} if isinstance(value, str) else {}
            else:
                say_once(f"ignored in messages, because it changes no answer: {name}")
        if self.role == "function" or (self.role == "tool" and not tools):
            raise _unsupported(f"{where}.role", f" {self.role!r}")
        if self.tool_calls:
            if not tools or self.role != "assistant":
                raise _unsupported(f"{where}.tool_calls")
            kept["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": call.function.for_template(),
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            kept["tool_call_id"] = self.tool_call_id
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self._text(f"{where}.content"), **kept}

    def _text(self, where: str) -> str:
        if self.content is None:
            if self.role in ("assistant", "tool"):
                return ""
            raise RequestError(f"{where} is missing; every message needs text", where)
        if isinstance(self.content, str):
            return self.content
        texts = []
        for part in self.content:
            kind = part.get("type")
            if kind in _THOUGHTS:
                continue
            if kind not in _TEXTS:
                raise RequestError(
                    f"{where} has a part of type {kind!r}; only text is supported",
                    where,
                    "unsupported_parameter",
                )
            text = part.get(_TEXTS[kind])
            if not isinstance(text, str):
                raise RequestError(f"{where} has a text part without a text", where)
            texts.append(text)
        return "\n".join(texts)


def template_messages(messages: Sequence[Message], template: str | None) -> list[dict[str, Any]]:
    """Messages for a chat template. Raises RequestError naming the message at fault."""
    if not messages:
        raise RequestError("messages is an empty list", "messages")
    tools = template is not None and "tool" in template
    return [message.for_template(f"messages[{i}]", tools) for i, message in enumerate(messages)]


def _unsupported(where: str, what: str = "") -> RequestError:
    message = f"{where}{what} is not supported by this model's chat template"
    return RequestError(message, where, "unsupported_parameter")
