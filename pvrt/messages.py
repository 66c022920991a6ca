"""Parts of a conversation as chat templates expect them, for the server and for training text."""

import json
from typing import Any


def text_of(content: Any) -> str:
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


def arguments_of(arguments: Any) -> Any:
    """The arguments of a called function as an object; clients send them as JSON in a string.

    Raises ValueError for a string that is not JSON.
    """
    return json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
