"""LangChain's clients of OpenAI."""

import asyncio
import json
from typing import Any

from clients.client import HELLO, Answer, Client, Where, joined
from clients.openai_client import City, Weather, options_of


def _of_message(message: Any, info: dict[str, Any] | None = None) -> Answer:
    usage = message.usage_metadata or {}
    info = {**message.response_metadata, **(info or {})}
    scores = (info.get("logprobs") or {}).get("content") or []
    return Answer(
        str(message.text),
        [(call["name"], json.dumps(call["args"])) for call in message.tool_calls],
        info.get("finish_reason"),
        usage.get("total_tokens"),
        [(score["token"], score["logprob"]) for score in scores],
        info.get("id") or message.id,
    )


class LangChain(Client):
    """ChatOpenAI on either API, and OpenAI for completions."""

    distribution = "langchain-openai"
    lacks = frozenset({"completion: token ids"})

    def __init__(self, where: Where) -> None:
        from langchain_openai import ChatOpenAI, OpenAI

        super().__init__(where)
        options: dict[str, Any] = {"model": where.model, **options_of(where)}
        self._chats = ChatOpenAI(stream_usage=True, **options)
        self._responses = ChatOpenAI(use_responses_api=True, **options)
        self._llm = OpenAI(**options)

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        from langchain_core.messages import convert_to_messages

        if "model" in options:
            other = LangChain(Where(self.where.url, options.pop("model"), self.where.key))
            return other.chat(messages, **options)
        found = self._chats.generate([convert_to_messages(messages)], **options)
        chats: Any = found.generations[0]
        return [_of_message(chat.message, chat.generation_info) for chat in chats]

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options.pop("stream_options", None)  # stream_usage asks for it
        whole: Any = None
        pieces = []
        for piece in self._chats.stream(messages, **options):
            pieces.append(Answer(str(piece.text)))
            whole = piece if whole is None else whole + piece
        last = _of_message(whole)
        return joined([*pieces, Answer("", last.calls, last.finish, last.total_tokens)])

    def chat_async(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return [_of_message(asyncio.run(self._chats.ainvoke(messages, **options)))]

    def complete(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        prompts = prompt if isinstance(prompt, list) else [prompt]
        answers = []
        for row in self._llm.generate(prompts, **options).generations:
            for found in row:
                info = found.generation_info or {}
                listed = info.get("logprobs") or {}
                pairs = zip(listed.get("tokens", []), listed.get("token_logprobs", []), strict=True)
                answers.append(
                    Answer(found.text, finish=info.get("finish_reason"), scores=[*pairs])
                )
        return answers

    def complete_stream(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return [Answer("".join(self._llm.stream(prompt, **options)))]

    def respond(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return [_of_message(self._responses.invoke(given, **options))]

    def respond_stream(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return joined([_of_message(piece) for piece in self._responses.stream(given, **options)])

    def structured(self, api: str) -> Any:
        """See Client."""
        model = self._chats if api == "chat" else self._responses
        limited = model.model_copy(update={"max_tokens": 200})
        return limited.with_structured_output(Weather).invoke("Paris?").model_dump()

    def agent(self, api: str, stream: bool) -> str:
        """See Client: a tool of LangChain's, bound, called, and its result sent back."""
        from langchain_core.messages import HumanMessage
        from langchain_core.tools import tool

        @tool
        def weather(city: City, warm: bool) -> str:
            """The weather of a city."""
            return f"rain in {city}"

        model = self._chats if api == "chat" else self._responses
        limited = model.model_copy(update={"max_tokens": 200})
        history: list[Any] = [HumanMessage("Hello")]
        bound = limited.bind_tools([weather], tool_choice="weather", strict=True)
        if stream:
            whole: Any = None
            for piece in bound.stream(history):
                whole = piece if whole is None else whole + piece
            history.append(whole)
        else:
            history.append(bound.invoke(history))
        history += [weather.invoke(call) for call in history[-1].tool_calls]
        short = model.model_copy(update={"max_tokens": 12})
        return str(short.bind_tools([weather], tool_choice="none").invoke(history).text)

    def batch(self, questions: list[str]) -> int:
        """See Client."""
        return len(self._chats.batch(questions, max_tokens=4))

    def leave(self) -> None:
        """See Client."""
        for _ in self._chats.stream(HELLO, max_tokens=200):
            break
