"""LiteLLM, as proxies and agents use it."""

import asyncio
import os
from typing import Any

from clients.client import HELLO, SECONDS, Answer, Client, Where, joined
from clients.openai_client import Weather, of_chat, of_chunk, of_completion, of_events, of_response


class LiteLLM(Client):
    """Its functions, with `openai/` before the model's name."""

    distribution = "litellm"

    def __init__(self, where: Where) -> None:
        super().__init__(where)
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
        import litellm

        litellm.suppress_debug_info = True
        self._library: Any = litellm

    def _options(self, options: dict[str, Any], kind: str = "openai") -> dict[str, Any]:
        named = f"{kind}/{options.pop('model', self.where.model)}"
        where = {"api_base": self.where.api, "api_key": self.where.key, "timeout": SECONDS}
        return {"model": named, "num_retries": 0, "max_retries": 0, **where, **options}

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return of_chat(self._library.completion(messages=messages, **self._options(options)))

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = self._options({**options, "stream": True})
        return joined([of_chunk(c) for c in self._library.completion(messages=messages, **options)])

    def chat_async(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = self._options(options)
        return of_chat(asyncio.run(self._library.acompletion(messages=messages, **options)))

    def complete(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = self._options(options, "text-completion-openai")
        return of_completion(self._library.text_completion(prompt=prompt, **options))

    def complete_stream(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = self._options({**options, "stream": True}, "text-completion-openai")
        chunks = self._library.text_completion(prompt=prompt, **options)
        return [Answer("".join(chunk.choices[0].text or "" for chunk in chunks))]

    def respond(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return of_response(self._library.responses(input=given, **self._options(options)))

    def respond_stream(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        options = self._options({**options, "stream": True})
        return of_events(list(self._library.responses(input=given, **options)))

    def structured(self, api: str) -> Any:
        """See Client."""
        if api == "responses":
            return self.respond("Hello", text_format=Weather, max_output_tokens=200)[0].text
        return self.chat(HELLO, response_format=Weather, max_tokens=200)[0].text

    def batch(self, questions: list[str]) -> int:
        """See Client."""
        chats = [[{"role": "user", "content": question}] for question in questions]
        options = self._options({"max_tokens": 4})
        return len(of_each(self._library.batch_completion(messages=chats, **options)))

    def leave(self) -> None:
        """See Client."""
        options = self._options({"stream": True, "max_tokens": 200})
        for _ in self._library.completion(messages=HELLO, **options):
            break


def of_each(answers: list[Any]) -> list[Answer]:
    """The answers of a batch, in which errors stand in the place of answers."""
    return [answer for found in answers for answer in of_chat(found)]
