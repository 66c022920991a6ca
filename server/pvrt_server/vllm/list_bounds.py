"""Lists of requests before vLLM sees them: each of one kind, and none without end.

pydantic collects an error for every item of a list, in every branch of a union: seconds and
gigabytes of one request. vLLM runs as many prompts as it is given, and looks for every stop at
every token.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from pvrt_server.api.body import MOST_FIELDS, Body
from pvrt_server.api.exception_handlers import request_error
from pvrt_server.engine.engine import check_sequences
from pvrt_server.engine.sampling import MAX_STOPS

#: Of messages, their parts, and tools.
MOST_ITEMS = 4096
#: Bytes of a body all of whose errors may be collected.
SHORT = 10_000

_Objects = Annotated[list[dict[str, Any]], Field(max_length=MOST_ITEMS)]
_Words = Annotated[list[str], Field(max_length=MAX_STOPS)]


class _Message(Body):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | _Objects | None = None
    tool_calls: _Objects | None = None


class _Lists(Body):
    """The fields of all requests that hold lists or mappings; others pass."""

    model_config = ConfigDict(extra="allow")

    prompt: str | list[int] | list[list[int]] | list[str] | None = None
    messages: Annotated[list[_Message], Field(max_length=MOST_ITEMS)] | None = None
    input: Any = None
    tools: _Objects | None = None
    stop: str | _Words | None = None
    bad_words: _Words | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    tokens: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MOST_FIELDS)] | None = None


class _Responses(_Lists):
    input: str | _Objects


def bound_lists(request: Any, path: str, size: int) -> None:
    """Raise RequestError at the first item of a list that has no place there, or is one too many,
    and for more answers than a request may ask for.

    What is wrong with bodies of a small size, in bytes, is left to vLLM's own errors.
    """
    if not isinstance(request, dict):
        return
    prompt, choices = request.get("prompt"), request.get("n")
    prompts = 1
    if isinstance(prompt, list) and not all(isinstance(each, int) for each in prompt[:1]):
        prompts = len(prompt)
    check_sequences(prompts * (choices if isinstance(choices, int) else 1))
    if size <= SHORT:
        return
    form = _Responses if path.endswith("/responses") else _Lists
    try:
        form.model_validate(request)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        raise request_error(
            [{**each, "loc": ("body", *each["loc"])} for each in problems]
        ) from None
