"""The official client, synchronous and asynchronous, and instructor on top of it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import pydantic

from clients.client import HELLO, SECONDS, Answer, Client, Where, joined

City = Annotated[str, pydantic.Field(max_length=12)]


class Weather(pydantic.BaseModel):
    """The schema of `features`, as users of Python write it."""

    city: City
    warm: bool


def options_of(where: Where) -> dict[str, Any]:
    """How the official client is made."""
    return {"base_url": where.api, "api_key": where.key, "max_retries": 0, "timeout": SECONDS}


def of_chat(answer: Any) -> list[Answer]:
    """The choices of a chat completion."""
    total = answer.usage and answer.usage.total_tokens
    return [
        Answer(
            choice.message.content or "",
            [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []],
            choice.finish_reason,
            total,
            _scores(choice),
            answer.id,
        )
        for choice in answer.choices
    ]


def of_chunk(chunk: Any) -> Answer:
    """What a chunk of a streamed chat adds."""
    total = chunk.usage.total_tokens if getattr(chunk, "usage", None) else None
    if not chunk.choices:
        return Answer("", total_tokens=total)
    choice = chunk.choices[0]
    calls = [(c.function.name, c.function.arguments or "") for c in choice.delta.tool_calls or []]
    return Answer(choice.delta.content or "", calls, choice.finish_reason, total)


def of_completion(answer: Any) -> list[Answer]:
    """The choices of a completion."""
    return [
        Answer(
            choice.text,
            finish=choice.finish_reason,
            total_tokens=answer.usage and answer.usage.total_tokens,
            scores=[*zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)]
            if choice.logprobs
            else [],
        )
        for choice in answer.choices
    ]


def of_response(answer: Any) -> list[Answer]:
    """A response's text and calls."""
    calls = [(i.name, i.arguments) for i in answer.output if i.type == "function_call"]
    total = answer.usage and answer.usage.total_tokens
    return [Answer(answer.output_text, calls, answer.status, total, id=answer.id)]


def of_events(events: list[Any]) -> list[Answer]:
    """A streamed response: the text of its deltas, and the rest of its last event."""
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    last = of_response(events[-1].response)[0]
    return [Answer(text, last.calls, last.finish, last.total_tokens, id=last.id)]


def _scores(choice: Any) -> list[tuple[str, float | None]]:
    listed = choice.logprobs.content if choice.logprobs else None
    return [(score.token, score.logprob) for score in listed or []]


class OpenAI(Client):
    """The official client."""

    distribution = "openai"

    def __init__(self, where: Where) -> None:
        import openai

        super().__init__(where)
        self.client: Any = openai.OpenAI(**options_of(where))

    def _named(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.where.model, **options}

    def models(self) -> list[str]:
        """The list, every card of which can be asked for."""
        names = [card.id for card in self.client.models.list().data]
        return [self.client.models.retrieve(name).id for name in names]

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = self._named(options)
        return of_chat(self.client.chat.completions.create(messages=messages, **options))

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = {**self._named(options), "stream": True}
        chunks = self.client.chat.completions.create(messages=messages, **options)
        return joined([of_chunk(chunk) for chunk in chunks])

    def complete(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return of_completion(self.client.completions.create(prompt=prompt, **self._named(options)))

    def complete_stream(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = {**self._named(options), "stream": True}
        chunks = self.client.completions.create(prompt=prompt, **options)
        return joined([answer for chunk in chunks for answer in of_completion(chunk)])

    def respond(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return of_response(self.client.responses.create(input=given, **self._named(options)))

    def respond_stream(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = {**self._named(options), "stream": True}
        return of_events(list(self.client.responses.create(input=given, **options)))

    def structured(self, api: str) -> Any:
        """See Client: `parse` with a model of pydantic."""
        if api == "chat":
            answer = self.client.chat.completions.parse(
                **self._named({"messages": HELLO, "response_format": Weather, "max_tokens": 200})
            )
            return answer.choices[0].message.parsed.model_dump()
        options = self._named({"text_format": Weather, "max_output_tokens": 200})
        return self.client.responses.parse(input="Say hello.", **options).output_parsed.model_dump()

    def leave(self) -> None:
        """See Client."""
        options = self._named({"stream": True, "max_tokens": 200})
        opened = self.client.chat.completions.create(messages=HELLO, **options)
        next(iter(opened))
        opened.close()

    def close(self) -> None:
        """See Client."""
        self.client.close()


class AsyncOpenAI(Client):
    """The official client's asynchronous half."""

    distribution = "openai"

    def _run(self, body: Callable[[Any], Awaitable[Any]]) -> Any:
        import openai

        async def session() -> Any:
            async with openai.AsyncOpenAI(**options_of(self.where)) as client:
                return await body(client)

        return asyncio.run(session())

    def _ask(self, kind: Callable[[Any], Any], options: dict[str, Any]) -> Any:
        return self._run(lambda client: kind(client).create(model=self.where.model, **options))

    def _stream(self, kind: Callable[[Any], Any], options: dict[str, Any]) -> list[Any]:
        async def read(client: Any) -> list[Any]:
            given = {"model": self.where.model, **options, "stream": True}
            return [part async for part in await kind(client).create(**given)]

        found: list[Any] = self._run(read)
        return found

    def models(self) -> list[str]:
        """See Client."""

        async def names(client: Any) -> list[str]:
            return [card.id async for card in client.models.list()]

        found: list[str] = self._run(names)
        return found

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        given = {"model": self.where.model, "messages": messages, **options}
        return of_chat(self._run(lambda client: client.chat.completions.create(**given)))

    chat_async = chat

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        given = {"messages": messages, **options}
        return joined([of_chunk(c) for c in self._stream(lambda c: c.chat.completions, given)])

    def complete(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return of_completion(self._ask(lambda c: c.completions, {"prompt": prompt, **options}))

    def complete_stream(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        chunks = self._stream(lambda c: c.completions, {"prompt": prompt, **options})
        return joined([answer for chunk in chunks for answer in of_completion(chunk)])

    def respond(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return of_response(self._ask(lambda c: c.responses, {"input": given, **options}))

    def respond_stream(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return of_events(self._stream(lambda c: c.responses, {"input": given, **options}))

    def structured(self, api: str) -> Any:
        """See Client."""

        async def parse(client: Any) -> Any:
            if api == "chat":
                answer = await client.chat.completions.parse(
                    model=self.where.model, messages=HELLO, response_format=Weather, max_tokens=200
                )
                return answer.choices[0].message.parsed
            given = {"input": "Say hello.", "text_format": Weather, "max_output_tokens": 200}
            return (await client.responses.parse(model=self.where.model, **given)).output_parsed

        return self._run(parse).model_dump()

    def leave(self) -> None:
        """See Client."""

        async def look(client: Any) -> None:
            options = {"model": self.where.model, "stream": True, "max_tokens": 200}
            opened = await client.chat.completions.create(messages=HELLO, **options)
            async for _ in opened:
                break
            await opened.close()

        self._run(look)


class Instructor(OpenAI):
    """instructor, which asks for models of pydantic; without one it hands on what it is given."""

    distribution = "instructor"
    models = complete = complete_stream = respond = respond_stream = leave = None  # type: ignore[assignment]
    lacks = frozenset({"chat: streamed tool", "chat: stream with usage"})

    def _patched(self, mode: str) -> Any:
        import instructor

        return instructor.from_openai(self.client, mode=getattr(instructor.Mode, mode))

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client: tools and schemas by the mode that asks for them."""
        form = options.get("response_format", {}).get("type")
        mode = {"json_schema": "JSON_SCHEMA", "json_object": "JSON"}.get(form, "TOOLS")
        strict = mode == "JSON_SCHEMA"
        if strict:
            del options["response_format"]
        create = self._patched(mode).chat.completions.create
        model = Weather if strict else None
        options = {**self._named(options), "response_model": model, "max_retries": 0}
        answer = create(messages=messages, **options)
        return [Answer(answer.model_dump_json())] if strict else of_chat(answer)

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client: without a model, the chunks themselves."""
        options = {**self._named(options), "response_model": None, "stream": True}
        chunks = self._patched("TOOLS").chat.completions.create(messages=messages, **options)
        return joined([of_chunk(chunk) for chunk in chunks])

    def structured(self, api: str) -> Any:
        """See Client: the default mode, whole and in parts."""
        mode, limit = (
            ("TOOLS", "max_tokens") if api == "chat" else ("RESPONSES_TOOLS", "max_output_tokens")
        )
        client = self._patched(mode)
        options = self._named({"messages": HELLO, "response_model": Weather, limit: 200})
        whole = client.chat.completions.create(max_retries=0, **options)
        if api == "chat":
            for _ in client.chat.completions.create_partial(**options):
                pass
        return whole.model_dump()
