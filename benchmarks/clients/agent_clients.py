"""Libraries that agents are built with: openai-agents and pydantic-ai."""

import asyncio
from typing import Any

from clients.client import FLAT_FORM, Answer, Client
from clients.openai_client import City, Weather, options_of

#: They answer once, know no whole completions, and write messages of tools themselves.
_NOT_OF_AGENTS = frozenset(
    {"chat: n", "chat: a tool's result", "chat: streamed tool", "chat: json_object"}
)


class OpenAIAgents(Client):
    """openai-agents, on either API."""

    distribution = "openai-agents"
    lacks = _NOT_OF_AGENTS | {"chat: json_schema", "chat: logprobs"}

    def _settings(self, options: dict[str, Any]) -> Any:
        import agents

        own = (
            "temperature",
            "max_tokens",
            "top_p",
            "frequency_penalty",
            "tool_choice",
            "parallel_tool_calls",
            "extra_body",
        )
        known = {name: options.pop(name) for name in own if name in options}
        return agents.ModelSettings(**known, include_usage=True, extra_args=options or None)

    async def _run(
        self, given: Any, api: str, options: dict[str, Any], stream: bool = False, **agent: Any
    ) -> Any:
        import agents
        import openai

        agents.set_tracing_disabled(True)
        kinds = {
            "responses": agents.OpenAIResponsesModel,
            "chat": agents.OpenAIChatCompletionsModel,
        }
        name = options.pop("model", self.where.model)
        async with openai.AsyncOpenAI(**options_of(self.where)) as client:
            model = kinds[api](model=name, openai_client=client)
            whole = agents.Agent(
                name="a", model=model, model_settings=self._settings(options), **agent
            )
            if not stream:
                return await agents.Runner.run(whole, given)
            running = agents.Runner.run_streamed(whole, given)
            async for _ in running.stream_events():
                pass
            return running

    def _ask(self, given: Any, api: str, options: dict[str, Any], stream: bool) -> list[Answer]:
        tools = [self._tool()] if options.pop("tools", None) else []
        choice = options.get("tool_choice")
        if isinstance(choice, dict):
            options["tool_choice"] = "weather"
        more: dict[str, Any] = {"tool_use_behavior": "stop_on_first_tool"} if tools else {}
        if api == "chat":
            more["instructions"], given = _apart(given)
            given = _as_input(given)
        done = asyncio.run(self._run(given, api, options, stream, tools=tools, **more))
        calls = [
            (item.raw_item.name, item.raw_item.arguments)
            for item in done.new_items
            if item.type == "tool_call_item"
        ]
        total = done.context_wrapper.usage.total_tokens
        last = done.raw_responses[-1].response_id
        return [Answer("" if calls else str(done.final_output), calls, None, total, id=last)]

    def _tool(self) -> Any:
        """A tool that is there until it was called: small models would call it again and again."""
        import agents

        calls: list[str] = []

        @agents.function_tool(is_enabled=lambda context, agent: not calls)  # type: ignore[untyped-decorator]
        def weather(city: City, warm: bool) -> str:
            """The weather of a city."""
            calls.append(city)
            return f"rain in {city}"

        return weather

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask(messages, "chat", options, stream=False)

    chat_async = chat

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options.pop("stream_options", None)  # include_usage asks for it
        return self._ask(messages, "chat", options, stream=True)

    def respond(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask(given, "responses", _limited(options), stream=False)

    def respond_stream(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask(given, "responses", _limited(options), stream=True)

    def agent(self, api: str, stream: bool) -> str:
        """See Client: the first turn must call, the second answers in a form that ends."""
        options = {"tool_choice": "required", "parallel_tool_calls": False}
        options |= {"max_tokens": 200, "temperature": 0}
        given = {"tools": [self._tool()], "instructions": "Help.", "output_type": Weather}
        return str(asyncio.run(self._run("Hello", api, options, stream, **given)).final_output)

    def structured(self, api: str) -> Any:
        """See Client."""
        options = {"max_tokens": 200, "temperature": 0}
        done = asyncio.run(self._run("Hello", api, options, output_type=Weather))
        return done.final_output.model_dump()


def _apart(messages: Any) -> tuple[str | None, Any]:
    """What a system message says, which is an agent's instructions; and the others."""
    said = [m["content"] for m in messages if m["role"] == "system"]
    return "\n".join(said) or None, [m for m in messages if m["role"] != "system"]


def _as_input(messages: Any) -> Any:
    """Content in parts as /v1/responses has it, which is the library's own form."""

    def part(given: Any) -> Any:
        return {**given, "type": "input_text"} if given.get("type") == "text" else given

    return [
        {**m, "content": [part(p) for p in m["content"]]} if isinstance(m["content"], list) else m
        for m in messages
    ]


def _limited(options: dict[str, Any]) -> dict[str, Any]:
    """The library refuses a response that its limit cut, and small models end in a form alone."""
    options.pop("max_output_tokens")
    form = {} if "tools" in options else {"extra_body": {"text": options.pop("text", FLAT_FORM)}}
    return {"max_tokens": 200, **form, **options}


class PydanticAI(Client):
    """pydantic-ai, on either API."""

    distribution = "pydantic-ai-slim"
    lacks = _NOT_OF_AGENTS | {
        "chat: json_schema",
        "chat: stream with usage",
        "responses: previous_response_id",
        "responses: json_schema",
        "chat: named tool",  # what must be called it must be told step by step
        "chat: required tool",
        "responses: named tool",
    }
    _NAMES = {  # noqa: RUF012  # what it calls OpenAI's options
        "stop": "stop_sequences",
        "logprobs": "openai_logprobs",
        "top_logprobs": "openai_top_logprobs",
        "max_output_tokens": "max_tokens",
        "previous_response_id": "openai_previous_response_id",
    }

    async def _run(
        self, given: Any, api: str, options: dict[str, Any], stream: bool = False, **more: Any
    ) -> Any:
        """What a run gives; of a streamed one its text or output, and the run."""
        import openai
        import pydantic_ai
        from pydantic_ai.models import openai as models
        from pydantic_ai.providers.openai import OpenAIProvider

        kinds = {"chat": models.OpenAIChatModel, "responses": models.OpenAIResponsesModel}
        async with openai.AsyncOpenAI(**options_of(self.where)) as client:
            name = options.pop("model", self.where.model)
            model = kinds[api](name, provider=OpenAIProvider(openai_client=client))
            settings: Any = {self._NAMES.get(key, key): value for key, value in options.items()}
            agent: Any = pydantic_ai.Agent(model, model_settings=settings, retries=0, **more)
            if not stream:
                return await agent.run(given)
            async with agent.run_stream(given) as run:
                if "output_type" in more:
                    return await run.get_output(), run
                return "".join([piece async for piece in run.stream_text(delta=True)]), run

    def _ask(
        self, given: Any, api: str, options: dict[str, Any], stream: bool = False
    ) -> list[Answer]:
        more: dict[str, Any] = {"tools": [_weather] if options.pop("tools", None) else []}
        for name in ("stream_options", "store"):
            options.pop(name, None)
        if api == "chat":
            more["instructions"], (*_, last) = _apart(given)
            parts = last["content"]
            given = parts if isinstance(parts, str) else [part["text"] for part in parts]
        done = asyncio.run(self._run(given, api, options, stream, **more))
        if stream:
            return [Answer(done[0], total_tokens=done[1].usage.total_tokens)]
        made = [part for message in done.all_messages() for part in message.parts]
        calls = [(p.tool_name, p.args_as_json_str()) for p in made if p.part_kind == "tool-call"]
        details = done.response.provider_details or {}
        scores = [(s["token"], s["logprob"]) for s in details.get("logprobs") or []]
        total, number = done.usage.total_tokens, done.response.provider_response_id
        return [Answer(str(done.output), calls, None, total, scores, number)]

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask(messages, "chat", options)

    chat_async = chat

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask(messages, "chat", options, stream=True)

    def respond(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask(given, "responses", options)

    def respond_stream(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask(given, "responses", options, stream=True)

    def agent(self, api: str, stream: bool) -> str:
        """See Client: a tool and an answer that is one, too, so that some tool must be called. The
        first is there until it was called: small models would call it again and again."""
        import pydantic_ai

        calls: list[str] = []

        def weather(city: City, warm: bool) -> str:
            """The weather of a city."""
            calls.append(city)
            return f"rain in {city}"

        async def prepared(context: Any, definition: Any) -> Any:
            return None if calls else definition

        tool = pydantic_ai.Tool(weather, prepare=prepared)
        options = {"max_tokens": 200, "temperature": 0, "parallel_tool_calls": False}
        more = {"tools": [tool], "output_type": Weather}
        done = asyncio.run(self._run("Hello", api, options, stream, **more))
        return str(done[0] if stream else done.output)

    def structured(self, api: str) -> Any:
        """See Client."""
        # As in `features`: blanks that a grammar allows must cost a small model something.
        penalty = {"frequency_penalty": 2} if api == "chat" else {}
        options: dict[str, Any] = {"max_tokens": 200, **penalty}
        done = asyncio.run(self._run("Hello", api, options, output_type=Weather))
        return done.output.model_dump()


def _weather(city: City, warm: bool) -> str:
    """The weather of a city."""
    return f"rain in {city}"
