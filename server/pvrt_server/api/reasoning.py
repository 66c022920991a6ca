"""Reasoning: what a model writes between <think> and </think>, kept apart from its answer."""

from typing import Literal

from pvrt_server.engine.text import TextCodec, overlap

_OPEN, _CLOSE = "<think>", "</think>"
#: Where an answer stands when it begins: inside of a thought, perhaps before one, or past all.
Thought = Literal["inside", "before", "past"]

_THOUGHT_RULES = 'thought[lazy]: THOUGHT "</think>"\nTHOUGHT: /(.|\\n)*/\nGAP: /\\n{1,2}/\n'
_STARTS = {"inside": "thought GAP? answer", "before": '("<think>" thought GAP?)? answer'}


def thought_of(codec: TextCodec, prompt_ids: list[int]) -> Thought:
    """Where the answer to a prompt under the chat template begins."""
    end = codec.tokenizer.decode(prompt_ids[-12:], skip_special_tokens=False).rstrip()
    if end.endswith(_OPEN):
        return "inside"
    template = codec.template() or ""
    knows = _OPEN in template or _CLOSE in template
    return "before" if knows and not end.endswith(_CLOSE) else "past"


def after_thought(rules: str, thought: Thought) -> str:
    """A grammar (llguidance's Lark) that binds what follows the thought, and the thought not."""
    if thought == "past":
        return rules
    answer = rules.replace("start:", "answer:", 1)
    return f"start: {_STARTS[thought]}\n{_THOUGHT_RULES}{answer}"


class ReasoningStream:
    """Text that arrives piece by piece, taken apart into reasoning and answer."""

    def __init__(self, thought: Thought) -> None:
        self._thought = thought
        self._held = ""
        self._fresh = True  # nothing of this part was handed out: space before it is dropped

    def push(self, text: str, last: bool) -> tuple[str, str]:
        """(reasoning, answer) that the text adds; the last text leaves nothing held back."""
        self._held += text
        if self._thought == "before":
            start = self._held.lstrip()
            if start.startswith(_OPEN):
                self._thought, self._held = "inside", start.removeprefix(_OPEN)
            elif last or not _OPEN.startswith(start):
                self._thought, self._fresh = "past", False
        reasoning = self._inside(last) if self._thought == "inside" else ""
        return reasoning, self._take(len(self._held)) if self._thought == "past" else ""

    def _inside(self, last: bool) -> str:
        place = self._held.find(_CLOSE)
        if place < 0:
            keep = 0 if last else overlap(self._held, _CLOSE)
            shown = self._held[: len(self._held) - keep].rstrip()
            return self._take(len(shown))
        reasoning = self._take(place).rstrip()
        self._held = self._held.removeprefix(_CLOSE)
        self._thought, self._fresh = "past", True
        return reasoning

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        taken = taken.lstrip() if self._fresh else taken
        self._fresh = self._fresh and not taken
        return taken
