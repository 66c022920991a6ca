"""What a client is asked, feature by feature, and how it says that an answer is wrong."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from clients.client import (
    CHOICE,
    FLAT_CHOICE,
    FLAT_FORM,
    FLAT_TOOL,
    FORM,
    HELLO,
    TOOL,
    Answer,
    Client,
    status_of,
)

# Grammars of JSON allow white space, and small models write it without end unless it costs them.
TERSE: dict[str, Any] = {"max_tokens": 200, "frequency_penalty": 2}
LONG: dict[str, Any] = {"max_tokens": 10**7}

_FEATURES: list[tuple[str, tuple[str, ...], Callable[[Any], None]]] = []


def features(client: Client) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """All features: calls that raise where an answer is wrong, None for no way to ask."""
    for name, needs, check in _FEATURES:
        asked = name not in client.lacks and all(getattr(client, need) for need in needs)
        yield name, partial(check, client) if asked else None


def expect(condition: object, problem: object = "not as expected") -> None:
    """Fail a feature with a reason."""
    if not condition:
        raise AssertionError(str(problem))


def _feature(name: str, *needs: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    def keep(check: Callable[[Any], None]) -> Callable[[Any], None]:
        _FEATURES.append((name, needs, check))
        return check

    return keep


def _complete(client: Any, prompt: Any = "Once upon a time", **options: Any) -> list[Answer]:
    answers: list[Answer] = client.complete(
        prompt, **{"max_tokens": 12, "temperature": 0, **options}
    )
    return answers


def _chat(client: Any, messages: Any = HELLO, **options: Any) -> Answer:
    answer: Answer = client.chat(messages, **{"max_tokens": 12, "temperature": 0, **options})[0]
    return answer


def _respond(client: Any, given: Any = "Say hello.", **options: Any) -> Answer:
    answer: Answer = client.respond(
        given, **{"max_output_tokens": 12, "temperature": 0, **options}
    )[0]
    return answer


def _refused(call: Callable[[], Any], status: int, *words: str) -> None:
    try:
        call()
    except Exception as error:  # every library has its own
        expect(status_of(error) == status, f"{type(error).__name__} {status_of(error)}: {error}")
        expect(all(word in str(error) for word in words), f"does not name it: {error}")
    else:
        raise AssertionError("no error")


def _is_weather(value: Any) -> None:
    value = json.loads(value) if isinstance(value, str) else value
    expect(isinstance(value["city"], str) and isinstance(value["warm"], bool), value)


@_feature("models", "models")
def _models(client: Any) -> None:
    expect(client.where.model in client.models())


@_feature("completion", "complete")
def _completion(client: Any) -> None:
    (answer,) = _complete(client)
    expect(answer.text is not None and answer.finish in ("stop", "length"), answer)


@_feature("completion: stream", "complete", "complete_stream")
def _completion_stream(client: Any) -> None:
    (answer,) = client.complete_stream("Once upon a time", max_tokens=12, temperature=0)
    expect(answer.text == _complete(client)[0].text, answer)


@_feature("completion: token ids", "complete")
def _token_ids(client: Any) -> None:
    ids = client.where.tokenize("Once upon a time")
    expect(_complete(client, ids)[0].text == _complete(client)[0].text)


@_feature("completion: several prompts", "complete")
def _prompts(client: Any) -> None:
    expect(len(_complete(client, ["a b", "c d"])) == 2)


@_feature("completion: n", "complete")
def _several(client: Any) -> None:
    expect(len(_complete(client, n=2, temperature=1)) == 2)


@_feature("completion: echo with logprobs", "complete")
def _echo(client: Any) -> None:
    (answer,) = _complete(client, "One two", echo=True, logprobs=1, max_tokens=1)
    expect(answer.text.startswith("One two") and answer.scores[0][1] is None, answer)


@_feature("completion: stop string", "complete")
def _completion_stop(client: Any) -> None:
    text = _complete(client)[0].text
    mark = text[3:6]  # spans tokens more often than not
    (cut,) = _complete(client, stop=[mark])
    expect(cut.text == text[: text.index(mark)] and cut.finish in ("stop", None), cut)


@_feature("completion: seed", "complete")
def _completion_seed(client: Any) -> None:
    expect(len({_complete(client, temperature=1, seed=3)[0].text for _ in range(2)}) == 1)


@_feature("completion: logit_bias", "complete")
def _bias(client: Any) -> None:
    (wanted, *_) = client.where.tokenize("a", add_special_tokens=False)
    (forced,) = _complete(client, logit_bias={str(wanted): 100}, max_tokens=1)
    expect(forced.text.strip() == "a", forced)


@_feature("completion: frequency_penalty", "complete")
def _completion_penalty(client: Any) -> None:
    plain, other = (_complete(client, max_tokens=40, **p) for p in ({}, {"frequency_penalty": 2}))
    expect(plain[0].text != other[0].text)


@_feature("completion: top_p, top_k, min_p", "complete")
def _sampling(client: Any) -> None:
    extra = {"top_k": 1, "min_p": 0.1}
    greedy = _complete(client, temperature=1, top_p=0.9, extra_body=extra)
    expect(greedy[0].text == _complete(client)[0].text)


@_feature("chat", "chat")
def _message(client: Any) -> None:
    expect(_chat(client).text)


@_feature("chat: usage", "chat")
def _usage(client: Any) -> None:
    expect((_chat(client).total_tokens or 0) > 0)


@_feature("chat: async", "chat_async")
def _async(client: Any) -> None:
    expect(client.chat_async(HELLO, max_tokens=12, temperature=0)[0].text)


@_feature("chat: system message", "chat")
def _system(client: Any) -> None:
    expect(_chat(client, [{"role": "system", "content": "Be brief."}, *HELLO]).text)


@_feature("chat: content in parts", "chat")
def _parts(client: Any) -> None:
    content = [{"type": "text", "text": "Say hello."}]
    expect(_chat(client, [{"role": "user", "content": content}]).text == _chat(client).text)


@_feature("chat: stream", "chat", "chat_stream")
def _stream(client: Any) -> None:
    (answer,) = client.chat_stream(HELLO, max_tokens=12, temperature=0)
    expect(answer.text == _chat(client).text, answer)


@_feature("chat: stream with usage", "chat_stream")
def _stream_usage(client: Any) -> None:
    options = {"stream_options": {"include_usage": True}}
    (answer,) = client.chat_stream(HELLO, max_tokens=12, temperature=0, **options)
    expect((answer.total_tokens or 0) > 0, answer)


@_feature("chat: n", "chat")
def _choices(client: Any) -> None:
    expect(len(client.chat(HELLO, n=2, temperature=1, max_tokens=12)) == 2)


@_feature("chat: stop string", "chat")
def _stop(client: Any) -> None:
    text = _chat(client).text
    mark = text[3:6]
    expect(_chat(client, stop=[mark]).text == text[: text.index(mark)])


@_feature("chat: seed", "chat")
def _seed(client: Any) -> None:
    expect(len({_chat(client, temperature=1, seed=3).text for _ in range(2)}) == 1)


@_feature("chat: logprobs", "chat")
def _logprobs(client: Any) -> None:
    (first, *_) = _chat(client, logprobs=True, top_logprobs=3).scores
    expect(first[1] is not None and first[1] <= 0, first)


@_feature("chat: top_p, top_k", "chat")
def _chat_sampling(client: Any) -> None:
    greedy = _chat(client, temperature=1, top_p=0.9, extra_body={"top_k": 1})
    expect(greedy.text == _chat(client).text)


@_feature("chat: json_schema", "chat")
def _schema(client: Any) -> None:
    _is_weather(_chat(client, response_format=FORM, **TERSE).text)


@_feature("chat: schema of the library's own", "structured")
def _own_schema(client: Any) -> None:
    _is_weather(client.structured("chat"))


@_feature("chat: json_object", "chat")
def _json(client: Any) -> None:
    answer = _chat(client, response_format={"type": "json_object"}, stop=['"'], **TERSE)
    expect(answer.text.lstrip().startswith("{"), answer)


@_feature("chat: named tool", "chat")
def _named(client: Any) -> None:
    (call,) = _chat(client, tools=[TOOL], tool_choice=CHOICE, **TERSE).calls
    expect(call[0] == "weather")
    _is_weather(call[1])


@_feature("chat: required tool", "chat")
def _required(client: Any) -> None:
    (call, *_) = _chat(client, tools=[TOOL], tool_choice="required", **TERSE).calls
    expect(call[0] == "weather")
    _is_weather(call[1])


@_feature("chat: tool_choice none", "chat")
def _none(client: Any) -> None:
    answer = _chat(client, tools=[TOOL], tool_choice="none")
    expect(not answer.calls and answer.text, answer)


@_feature("chat: streamed tool", "chat_stream")
def _streamed_tool(client: Any) -> None:
    (answer,) = client.chat_stream(HELLO, tools=[TOOL], tool_choice=CHOICE, temperature=0, **TERSE)
    expect([name for name, _ in answer.calls if name] == ["weather"], answer)
    _is_weather("".join(arguments for _, arguments in answer.calls))


@_feature("chat: a tool's result", "chat")
def _result(client: Any) -> None:
    call = {"name": "weather", "arguments": '{"city": "Kiel", "warm": false}'}
    calls = [{"id": "call_1", "type": "function", "function": call}]
    spoken = {"role": "assistant", "content": None, "tool_calls": calls}
    told = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
    answer = _chat(client, [*HELLO, spoken, told], tools=[TOOL], tool_choice="none")
    expect(answer.text, answer)


@_feature("chat: agent's loop", "agent")
def _agent(client: Any) -> None:
    expect(client.agent("chat", False))


@_feature("chat: agent's loop, streamed", "agent")
def _agent_stream(client: Any) -> None:
    expect(client.agent("chat", True))


@_feature("chat: batch", "batch")
def _batch(client: Any) -> None:
    expect(client.batch(["a", "b", "c"]) == 3)


@_feature("eight at once", "chat")
def _at_once(client: Any) -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda _: _chat(client, max_tokens=8).text, range(8)))
    expect(len(set(texts)) == 1, texts)


@_feature("leaving a stream", "leave", "chat")
def _leave(client: Any) -> None:
    for _ in range(4):
        client.leave()
    expect(_chat(client).text)


@_feature("responses", "respond")
def _responses(client: Any) -> None:
    answer = _respond(client)
    expect(answer.text and answer.total_tokens, answer)


@_feature("responses: stream", "respond", "respond_stream")
def _responses_stream(client: Any) -> None:
    (answer,) = client.respond_stream("Say hello.", max_output_tokens=12, temperature=0)
    expect(answer.text == _respond(client).text, answer)


@_feature("responses: previous_response_id", "respond")
def _previous(client: Any) -> None:
    first = _respond(client, store=True)
    expect(_respond(client, "And again.", previous_response_id=first.id).text)


@_feature("responses: named tool", "respond")
def _responses_tool(client: Any) -> None:
    options = {"tools": [FLAT_TOOL], "tool_choice": FLAT_CHOICE, "max_output_tokens": 200}
    (call,) = _respond(client, **options).calls
    expect(call[0] == "weather")
    _is_weather(call[1])


@_feature("responses: json_schema", "respond")
def _responses_schema(client: Any) -> None:
    _is_weather(_respond(client, text=FLAT_FORM, max_output_tokens=200).text)


@_feature("responses: agent's loop", "agent")
def _responses_agent(client: Any) -> None:
    expect(client.agent("responses", False))


@_feature("responses: agent's loop, streamed", "agent")
def _responses_agent_stream(client: Any) -> None:
    expect(client.agent("responses", True))


@_feature("responses: schema of the library's own", "structured")
def _responses_own_schema(client: Any) -> None:
    _is_weather(client.structured("responses"))


@_feature("error: unknown model", "chat")
def _unknown(client: Any) -> None:
    _refused(lambda: _chat(client, model="none"), 404, "none")


@_feature("error: bad value", "chat")
def _bad_value(client: Any) -> None:
    _refused(lambda: _chat(client, temperature=-1), 400, "temperature")


@_feature("error: context overflow", "chat")
def _overflow(client: Any) -> None:
    _refused(lambda: _chat(client, **LONG), 400, "10000000")


@_feature("error: wrong key", "chat")
def _wrong_key(client: Any) -> None:
    other = type(client)(type(client.where)(client.where.url, client.where.model, "wrong"))
    try:
        _refused(lambda: _chat(other), 401)
    finally:
        other.close()
