"""A model's chat template: what it makes of messages, and what that shows of the model."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from pvrt_server.errors import RequestError

_MARK = "pvrt"  # a text that no template writes by itself
_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "f", "parameters": {"type": "object"}},
}


class ChatTemplate:
    """The chat template of a tokenizer of transformers, which may have none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A request may set variables of the template, not choose another one or its own output.
        self._reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys()

    @property
    def known(self) -> bool:
        """Whether there is one."""
        return bool(self._tokenizer.chat_template)

    def source(self, tools: Sequence[Mapping[str, Any]] | None = None) -> str | None:
        """The template for conversations with or without tools; None where there is none."""
        try:
            template: str = self._tokenizer.get_chat_template(tools=tools)
        except ValueError:
            return None
        return template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: bool,
    ) -> str:
        """The text of a conversation. options are add_generation_prompt, continue_final_message.

        Raises RequestError when there is no template or it refuses the messages.
        """
        variables = variables or {}
        if reserved := sorted(self._reserved & variables.keys()):
            raise RequestError(
                f"chat_template_kwargs must not set {reserved[0]}", "chat_template_kwargs"
            )
        if not self.known:
            raise RequestError(
                "this checkpoint has no chat template: send a prompt to /v1/completions, or put "
                "the chat_template.jinja of the original model into its folder",
                "messages",
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                tokenize=False,
                **options,
                **variables,
            )
        # Templates are programs: they fail in every way on messages that they do not expect.
        except Exception as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        return text

    @cached_property
    def end_of_turn(self) -> str | None:
        """What the template writes behind an answer: the model writes it too. None for nothing."""
        user, answer = ({"role": role, "content": _MARK} for role in ("user", "assistant"))
        try:
            text = self.render([user, answer])
        except RequestError:
            return None
        return text.rpartition(_MARK)[2].strip() or None

    @cached_property
    def one_call_a_turn(self) -> bool:
        """Whether the template takes one call in a message and refuses two, as Llama 3's does."""
        return self._takes_calls(1) and not self._takes_calls(2)

    def _takes_calls(self, number: int) -> bool:
        calls = [_CALL] * number
        user = {"role": "user", "content": _MARK}
        try:
            self.render([user, {"role": "assistant", "content": "", "tool_calls": calls}], [_TOOL])
        except RequestError:
            return False
        return True


class MistralTemplate(ChatTemplate):
    """What mistral-common writes for a conversation; there is no text of a template."""

    known = True

    def source(self, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        """None: forms of tool calls cannot be told."""
