"""What a client library gets from a running server, feature by feature."""

import asyncio
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from server_features import (
    HELLO,
    SCHEMA,
    SECONDS,
    TERSE,
    TOOL,
    Feature,
    Where,
    expect,
    raises,
    tokenize,
)


def openai_sync(where: Where) -> Iterator[Feature]:
    """The official client."""
    import openai

    client = openai.OpenAI(
        base_url=f"{where.url}/v1", api_key=where.key, max_retries=0, timeout=SECONDS
    )

    def chat(**options: Any) -> Any:
        options = {"messages": HELLO, "max_tokens": 12, "temperature": 0, **options}
        return client.chat.completions.create(model=where.model, **options)

    def complete(**options: Any) -> Any:
        options = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, **options}
        return client.completions.create(model=where.model, **options)

    def models() -> None:
        (card, *_) = client.models.list().data
        expect(card.id == where.model and client.models.retrieve(card.id).id == card.id)

    def completion() -> None:
        answer = complete()
        expect(answer.usage.completion_tokens <= 12 and answer.choices[0].finish_reason)

    def token_ids() -> None:
        ids = tokenize(where, "Once upon a time")
        expect(complete(prompt=ids).choices[0].text == complete().choices[0].text)

    def echo() -> None:
        scores = complete(prompt="One two", echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
        expect(scores.token_logprobs[0] is None and scores.tokens[0] and scores.text_offset[0] == 0)

    def several() -> None:
        answer = complete(prompt=["a b", "c d"], n=2, temperature=1)
        expect(sorted(c.index for c in answer.choices) == [0, 1, 2, 3])

    def stop() -> None:
        text = complete().choices[0].text
        mark = text[3:6]  # spans tokens more often than not
        cut = complete(stop=[mark]).choices[0]
        expect(cut.text == text[: text.index(mark)] and cut.finish_reason == "stop", cut.text)

    def seed() -> None:
        texts = {complete(temperature=1, seed=3).choices[0].text for _ in range(2)}
        expect(len(texts) == 1)

    def bias() -> None:
        token = complete(logprobs=0, max_tokens=1).choices[0].logprobs.tokens[0]
        ids = tokenize(where, token, add_special_tokens=False)
        banned = complete(logit_bias={str(ids[0]): -100}, logprobs=0, max_tokens=1)
        expect(banned.choices[0].logprobs.tokens[0] != token)

    def penalties() -> None:
        plain, other = complete(max_tokens=40), complete(max_tokens=40, frequency_penalty=2)
        expect(plain.choices[0].text != other.choices[0].text)

    def sampling() -> None:
        # Few tokens: in 16 bits two may be the likeliest, and greedy decoding takes either.
        extra = {"top_k": 1, "min_p": 0.1}
        greedy = complete(temperature=1, top_p=0.9, max_tokens=2, extra_body=extra)
        expect(greedy.choices[0].text == complete(max_tokens=2).choices[0].text)

    def message() -> None:
        answer = chat(max_tokens=None, max_completion_tokens=5, user="someone")
        expect(answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens < 6)

    def chat_logprobs() -> None:
        (first, *_) = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
        expect(len(first.top_logprobs) == 3 and first.logprob <= 0 and first.bytes is not None)

    def parts() -> None:
        content = [{"type": "text", "text": "Say hello."}]
        answer = chat(messages=[{"role": "user", "content": content}])
        expect(answer.choices[0].message.content == chat().choices[0].message.content)

    def stream() -> None:
        chunks = list(chat(stream=True))
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        expect(text == chat().choices[0].message.content and chunks[-1].choices[0].finish_reason)

    def usage() -> None:
        *chunks, last = chat(stream=True, stream_options={"include_usage": True})
        expect(last.choices == [] and last.usage.total_tokens == chat().usage.total_tokens)
        expect(all(chunk.usage is None for chunk in chunks), "usage before the end")

    def schema() -> None:
        form = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}
        answer = chat(response_format=form, **TERSE)
        value = json.loads(answer.choices[0].message.content)
        expect(isinstance(value["city"], str) and isinstance(value["warm"], bool))

    def json_object() -> None:
        answer = chat(response_format={"type": "json_object"}, max_tokens=200, stop=["}"])
        expect(answer.choices[0].message.content.lstrip().startswith("{"))

    def named_tool() -> None:
        choice = {"type": "function", "function": {"name": "weather"}}
        (call,) = chat(tools=[TOOL], tool_choice=choice, **TERSE).choices[0].message.tool_calls
        expect(call.function.name == "weather" and "city" in json.loads(call.function.arguments))

    def required_tool() -> None:
        answer = chat(tools=[TOOL], tool_choice="required", **TERSE)
        (call, *_) = answer.choices[0].message.tool_calls
        expect(call.function.name == "weather" and "city" in json.loads(call.function.arguments))

    def no_tool() -> None:
        answer = chat(tools=[TOOL], tool_choice="none")
        expect(not answer.choices[0].message.tool_calls and answer.choices[0].message.content)

    def responses() -> None:
        answer = client.responses.create(
            model=where.model, input="Say hello.", max_output_tokens=12, store=False
        )
        expect(answer.output_text and answer.usage)

    def unknown() -> None:
        error: Any = raises(
            openai.NotFoundError,
            lambda: client.completions.create(model="none", prompt="a", max_tokens=1),
        )
        expect("none" in error.message, error.message)

    def bad_value() -> None:
        error: Any = raises(openai.BadRequestError, lambda: chat(temperature=-1))
        expect("temperature" in error.message, error.message)

    def overflow() -> None:
        error: Any = raises(openai.BadRequestError, lambda: chat(max_tokens=10**7))
        expect("10000000" in error.message, error.message)

    def wrong_key() -> None:
        other = client.with_options(api_key="wrong")
        raises(openai.AuthenticationError, lambda: other.models.list())

    yield from {
        "models": models,
        "completion": completion,
        "completion: token ids": token_ids,
        "completion: echo with logprobs": echo,
        "completion: n and several prompts": several,
        "completion: stop string": stop,
        "completion: seed": seed,
        "completion: logit_bias": bias,
        "completion: frequency_penalty": penalties,
        "completion: top_p, top_k, min_p": sampling,
        "chat": message,
        "chat: logprobs": chat_logprobs,
        "chat: content in parts": parts,
        "chat: stream": stream,
        "chat: stream with usage": usage,
        "chat: json_schema": schema,
        "chat: json_object": json_object,
        "chat: named tool": named_tool,
        "chat: required tool": required_tool,
        "chat: tool_choice none": no_tool,
        "responses": responses,
        "error: unknown model": unknown,
        "error: bad value": bad_value,
        "error: context overflow": overflow,
        "error: wrong key": wrong_key,
    }.items()


def openai_async(where: Where) -> Iterator[Feature]:
    """The official client's asynchronous half."""
    import openai

    def run(body: Callable[[Any], Any]) -> Callable[[], None]:
        async def session() -> None:
            async with openai.AsyncOpenAI(
                base_url=f"{where.url}/v1", api_key=where.key, max_retries=0, timeout=SECONDS
            ) as client:
                await body(client)

        return lambda: asyncio.run(session())

    def ask(client: Any, **options: Any) -> Any:
        options = {"max_tokens": 8, "temperature": 0, **options}
        return client.chat.completions.create(model=where.model, messages=HELLO, **options)

    async def chat(client: Any) -> None:
        expect((await ask(client)).choices[0].message.content is not None)

    async def stream(client: Any) -> None:
        chunks = [chunk async for chunk in await ask(client, stream=True)]
        expect(chunks[-1].choices[0].finish_reason)

    async def at_once(client: Any) -> None:
        answers = await asyncio.gather(*(ask(client) for _ in range(8)))
        expect(len({answer.choices[0].message.content for answer in answers}) == 1)

    async def leave(client: Any) -> None:
        for _ in range(4):
            opened = await ask(client, stream=True, max_tokens=400)
            async for _chunk in opened:
                break
            await opened.close()
        started = time.monotonic()
        await ask(client)
        expect(time.monotonic() - started < 30, "answers nobody waits for hold up others")

    async def error(client: Any) -> None:
        try:
            await ask(client, top_p=7)
        except openai.BadRequestError as problem:
            expect("top_p" in problem.message, problem.message)
        else:
            raise AssertionError("no BadRequestError")

    yield from {
        "chat": run(chat),
        "chat: stream": run(stream),
        "eight at once": run(at_once),
        "leaving a stream": run(leave),
        "error: bad value": run(error),
    }.items()


def langchain(where: Where) -> Iterator[Feature]:
    """LangChain's clients of OpenAI."""
    from langchain_openai import ChatOpenAI, OpenAI
    from openai import BadRequestError

    options: dict[str, Any] = {
        "base_url": f"{where.url}/v1",
        "api_key": where.key,
        "model": where.model,
        "temperature": 0,
        "max_retries": 0,
        "timeout": SECONDS,
    }
    model = ChatOpenAI(max_tokens=12, stream_usage=True, **options)

    def invoke() -> None:
        answer = model.invoke("Say hello.")
        expect(answer.usage_metadata["total_tokens"] > 0 and answer.response_metadata)

    def stream() -> None:
        chunks = list(model.stream("Say hello."))
        text = "".join(str(chunk.content) for chunk in chunks)
        expect(text == model.invoke("Say hello.").content)
        expect(any(chunk.usage_metadata for chunk in chunks), "no usage")

    def messages() -> None:
        expect(model.invoke([("system", "Be brief."), ("human", "Hi")]).content is not None)

    def asynchronous() -> None:
        expect(asyncio.run(model.ainvoke("Say hello.")).content is not None)

    def structured() -> None:
        form = {"title": "weather", "description": "Weather", **SCHEMA}
        wide = ChatOpenAI(**TERSE, **options)
        answer = wide.with_structured_output(form, method="json_schema").invoke("Paris?")
        expect(isinstance(answer["city"], str))

    def tools() -> None:
        wide = ChatOpenAI(**TERSE, **options)
        answer = wide.bind_tools([TOOL], tool_choice="weather").invoke("Paris?")
        expect(answer.tool_calls[0]["name"] == "weather" and "city" in answer.tool_calls[0]["args"])

    def completion() -> None:
        expect(isinstance(OpenAI(max_tokens=12, **options).invoke("Once upon"), str))

    def error() -> None:
        bad = ChatOpenAI(**{**options, "temperature": -1})
        expect("temperature" in str(raises(BadRequestError, lambda: bad.invoke("Hi"))))

    yield from {
        "chat": invoke,
        "chat: stream with usage": stream,
        "chat: batch": lambda: expect(len(model.batch(["a", "b", "c"])) == 3),
        "chat: system message": messages,
        "chat: async": asynchronous,
        "chat: json_schema": structured,
        "chat: named tool": tools,
        "completion": completion,
        "error: bad value": error,
    }.items()


def litellm(where: Where) -> Iterator[Feature]:
    """LiteLLM, as proxies and agents use it."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
    import litellm as library

    library.suppress_debug_info = True
    options: dict[str, Any] = {
        "model": f"openai/{where.model}",
        "api_base": f"{where.url}/v1",
        "api_key": where.key,
        "max_tokens": 12,
        "temperature": 0,
        "num_retries": 0,
        "timeout": SECONDS,
    }

    def ask(**changes: Any) -> Any:
        return library.completion(messages=HELLO, **{**options, **changes})

    def chat() -> None:
        expect(ask().usage.total_tokens > 0 and ask().choices[0].finish_reason)

    def stream() -> None:
        chunks = list(ask(stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        expect(text == ask().choices[0].message.content)
        expect(any(getattr(chunk, "usage", None) for chunk in chunks), "no usage")

    def asynchronous() -> None:
        expect(asyncio.run(library.acompletion(messages=HELLO, **options)).choices)

    def completion() -> None:
        changes = {**options, "model": f"text-completion-openai/{where.model}"}
        expect(library.text_completion(prompt="Once upon", **changes).choices[0].text is not None)

    def structured() -> None:
        form = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}
        answer = ask(response_format=form, **TERSE)
        expect("city" in json.loads(answer.choices[0].message.content))

    def tools() -> None:
        choice = {"type": "function", "function": {"name": "weather"}}
        (call,) = ask(tools=[TOOL], tool_choice=choice, **TERSE).choices[0].message.tool_calls
        expect("city" in json.loads(call.function.arguments))

    def unknown() -> None:
        raises(library.NotFoundError, lambda: ask(model="openai/none"))

    def bad_value() -> None:
        error = raises(library.BadRequestError, lambda: ask(temperature=-1))
        expect("temperature" in str(error))

    yield from {
        "chat": chat,
        "chat: stream with usage": stream,
        "chat: async": asynchronous,
        "completion": completion,
        "chat: json_schema": structured,
        "chat: named tool": tools,
        "error: unknown model": unknown,
        "error: bad value": bad_value,
    }.items()


#: By name: the features, and the distribution whose version the results name.
CLIENTS: dict[str, tuple[Callable[[Where], Iterator[Feature]], str]] = {
    "openai": (openai_sync, "openai"),
    "openai async": (openai_async, "openai"),
    "langchain": (langchain, "langchain-openai"),
    "litellm": (litellm, "litellm"),
}


def rows(name: str, where: Where) -> Iterator[dict[str, Any]]:
    """One client's features: client with its version, feature, whether it passes, and what not."""
    features, package = CLIENTS[name]
    client = f"{name} {importlib.metadata.version(package)}"
    for feature, check in features(where):
        row: dict[str, Any] = {"client": client, "feature": feature, "pass": True}
        try:
            check()
        except Exception as error:  # whatever a wrong answer leads to
            row |= {"pass": False, "problem": f"{type(error).__name__}: {error}"[:300]}
        yield row
