"""One row of training data as a document, from the forms in which the field publishes it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "developer": "system",
}
#: What a row must have, in the words of errors.
FORMS = (
    '"text", "messages", "conversations", "prompt" with "completion" or "instruction" with "output"'
)


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template, and the functions that the model may call in them.

    plain: the same as text, for a model without a template; None where there is no such text.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    plain: str | None = None


Document = str | Conversation


def document(row: Any) -> tuple[str, Document]:
    """The name of a row's form, and its text or conversation. Raises ValueError with the reason."""
    if not isinstance(row, Mapping):
        raise ValueError("is not an object with named fields")
    for name in ("text", "content"):
        if isinstance(row.get(name), str):
            return "text", row[name]
    for name in ("messages", "conversations", "conversation"):
        if row.get(name) is not None:
            return "conversations", Conversation(_messages(row[name]), _tools(row.get("tools")))
    answer = next((row[n] for n in ("completion", "response", "chosen") if row.get(n)), None)
    if row.get("prompt") is not None and answer is not None:
        parts = row["prompt"], answer
        if all(isinstance(part, str) and not part.startswith('[{"') for part in parts):
            return "prompts with completions", "".join(parts)
        both = [message for part in parts for message in _list(part)]
        return "conversations", Conversation(_messages(both), _tools(row.get("tools")))
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        said = [("system", row.get("system")), ("user", asked), ("assistant", row["output"])]
        chat = [{"role": role, "content": text} for role, text in said if text]
        plain = "\n\n".join(message["content"] for message in chat)
        return "instructions", Conversation(chat, None, plain)
    raise ValueError(f"has none of {FORMS}; it has {', '.join(map(str, row)) or 'nothing'}")


def _messages(value: Any) -> list[dict[str, Any]]:
    messages = [_message(message) for message in _list(value)]
    if not messages:
        raise ValueError("holds a conversation without messages")
    return messages


def _message(message: Any) -> dict[str, Any]:
    """As chat templates expect it: a known role, text, arguments as objects, nothing null."""
    if not isinstance(message, Mapping):
        raise ValueError("holds a message that is not an object")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise ValueError("holds a message without a role")
    content, calls = message.get("content", message.get("value")), message.get("tool_calls")
    if content is None and not calls:
        raise ValueError("holds a message without text")
    others = {
        name: value
        for name, value in message.items()
        if value is not None and name not in ("role", "from", "content", "value", "tool_calls")
    }
    if calls:
        others["tool_calls"] = [_call(call) for call in _list(calls)]
    text = "" if content is None else _text_of(content)
    return {"role": _ROLES.get(role, role), "content": text, **others}


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError("holds a tool call that is not an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("holds a tool call without a function's name")
    arguments = _arguments_of(function.get("arguments"))
    named = {"name": function["name"], "arguments": arguments}
    rest = {name: call[name] for name in ("id", "type") if call.get(name) is not None}
    return {"type": "function", **rest, "function": named}


def _tools(value: Any) -> list[Any] | None:
    return _list(value) if value else None


def _list(value: Any) -> list[Any]:
    """A list, which tables without nested columns hold as JSON."""
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, list):
        raise ValueError("holds something else where a list belongs")
    return value


def _text_of(content: Any) -> str:
    """The text of a message's content, which may come in parts of text.

    Raises ValueError for anything else: an image, no content.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("is missing; every message needs text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(f"has a part of type {kind!r}; only text is supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("has a text part without a text")
        texts.append(part["text"])
    return "\n".join(texts)


def _arguments_of(arguments: Any) -> Any:
    """The arguments of a called function as an object; many write them as JSON in a string.

    Raises ValueError for a string that is not JSON.
    """
    return json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
