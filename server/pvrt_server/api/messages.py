"""The messages of a conversation: from a request to what chat templates expect."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict

from pvrt.messages import arguments_of, text_of
from pvrt_server.api.body import Body
from pvrt_server.errors import RequestError

# What clients send back from earlier answers; templates have no use for it.
_IGNORED = frozenset({"refusal", "annotations", "audio"})


class CalledFunction(Body):
    """`tool_calls[i].function` of a message."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: str | None = None

    def for_template(self, where: str) -> dict[str, Any]:
        """With arguments as an object. Raises RequestError."""
        try:
            arguments = arguments_of(self.arguments)
        except ValueError as error:
            raise RequestError(
                f"{where}.arguments is not JSON: {error}", f"{where}.arguments"
            ) from error
        return {"name": self.name, "arguments": arguments}


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
            if value is None or value == [] or name in _IGNORED:
                continue
            if name not in ("name", "reasoning_content"):
                raise _unsupported(f"{where}.{name}")
            kept[name] = value
        if self.role == "function" or (self.role == "tool" and not tools):
            raise _unsupported(f"{where}.role", f" {self.role!r}")
        if self.tool_calls:
            if not tools or self.role != "assistant":
                raise _unsupported(f"{where}.tool_calls")
            kept["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": call.function.for_template(f"{where}.tool_calls[{i}].function"),
                }
                for i, call in enumerate(self.tool_calls)
            ]
        if self.tool_call_id is not None:
            kept["tool_call_id"] = self.tool_call_id
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self._text(f"{where}.content"), **kept}

    def _text(self, where: str) -> str:
        if self.content is None and self.tool_calls:
            return ""
        try:
            return text_of(self.content)
        except ValueError as error:
            raise RequestError(f"{where} {error}", where, "unsupported_parameter") from error


def template_messages(messages: Sequence[Message], template: str | None) -> list[dict[str, Any]]:
    """Messages for a chat template. Raises RequestError naming the message at fault."""
    if not messages:
        raise RequestError("messages is an empty list", "messages")
    tools = template is not None and "tool" in template
    return [message.for_template(f"messages[{i}]", tools) for i, message in enumerate(messages)]


def _unsupported(where: str, what: str = "") -> RequestError:
    message = f"{where}{what} is not supported by this model's chat template"
    return RequestError(message, where, "unsupported_parameter")
