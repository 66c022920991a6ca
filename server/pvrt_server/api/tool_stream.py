"""Text that arrives piece by piece, taken apart into content and tool calls.

Arguments are handed out as they are written. What only looked like a call becomes content in the
end: nothing that the model wrote is lost.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pvrt_server.api.tools import Tools
from pvrt_server.engine.text import overlap

# {"name": "f", "arguments": up to the value; several calls may also come as one list.
_HEAD = re.compile(
    r'\s*(?:\[\s*)?\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
_CLOSING = re.compile(r"\s*\}\s*\]?\s*")
# A head is complete within so many characters, or never.
_LONGEST_HEAD = 512


@dataclass(frozen=True)
class CallDelta:
    """A part of a tool call: its name comes first and once, its arguments' text in pieces."""

    number: int
    name: str | None
    arguments: str


class ToolStream:
    """One answer to a request with tools."""

    def __init__(self, tools: Tools) -> None:
        self._form = tools.form
        # Without a mark to tell a call from other JSON, the name must do.
        self._names = None if tools.form.begin else {f.name for f in tools.functions}
        self._most = tools.most_calls
        self._held = ""
        self._state = self._text if tools.form.begin else self._head
        self._value = _Value()
        self._string = ""
        self.calls = 0

    def push(self, text: str) -> Iterator[str | CallDelta]:
        """What the text adds: content as strings, and parts of calls."""
        self._held += text
        while True:
            before = len(self._held), self._state
            yield from self._state()
            if before == (len(self._held), self._state):
                return  # the rest waits for more

    def flush(self) -> Iterator[str | CallDelta]:
        """What was held back, once no more can follow."""
        held, self._held = self._held, ""
        if self._state == self._head and held.strip(" \n,;"):
            yield self._form.begin + held
        elif self._state == self._text and held and not (self.calls and held.isspace()):
            yield held

    def _text(self) -> Iterator[str | CallDelta]:
        """Content, up to the mark of a call."""
        mark = self._form.begin
        place = self._held.find(mark) if mark else -1
        if place >= 0:
            shown, self._held = self._held[:place].rstrip(), self._held[place + len(mark) :]
            self._state = self._head
        else:
            keep = overlap(self._held, mark)
            # Space before a call belongs to the call.
            shown = self._held[: len(self._held) - keep].rstrip() if mark else self._held
            self._held = self._held[len(shown) :]
        if shown:
            yield shown

    def _head(self) -> Iterator[str | CallDelta]:
        """Before a call's arguments."""
        head = _HEAD.match(self._held)
        name = json.loads(head[1], strict=False) if head else None
        if head and (self._names is None or name in self._names):
            self._held = self._held[head.end() :]
            self._state, self._value, self._string = self._arguments, _Value(), ""
            self.calls += 1
            if self._counts:
                yield CallDelta(self.calls - 1, name, "")
        elif head or len(self._held) > _LONGEST_HEAD or not _may_be_head(self._held):
            held, self._held = self._form.begin + self._held, ""
            self._state = self._text
            yield held

    @property
    def _counts(self) -> bool:
        return self._most is None or self.calls <= self._most

    def _arguments(self) -> Iterator[str | CallDelta]:
        if not self._value.begun:
            self._held = self._held.lstrip()
        taken = self._value.take(self._held)
        self._held = self._held[len(taken) :]
        if self._value.done:
            self._state = self._tail
        if self._value.quoted:  # some models write the arguments as a string that holds JSON
            self._string += taken
            taken = json.loads(self._string, strict=False) if self._value.done else ""
        if taken and self._counts:
            yield CallDelta(self.calls - 1, None, taken)

    def _tail(self) -> Iterator[str | CallDelta]:
        """After a call's arguments."""
        closing = _CLOSING.match(self._held)
        rest = self._held[closing.end() :] if closing else self._held.lstrip()
        if not rest or (rest != self._form.end and self._form.end.startswith(rest)):
            return
        if rest[0] in ",;":
            self._held, self._state = rest[1:], self._head
        else:
            self._held, self._state = rest.removeprefix(self._form.end), self._text
        yield from ()


def _may_be_head(text: str) -> bool:
    text = text.lstrip()
    return not text or text[0] in "[{"


class _Value:
    """Finds the end of one JSON value."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False
        self.begun = self.done = self.quoted = False

    def take(self, text: str) -> str:
        """The part of a text that belongs to the value."""
        if not self.begun:
            self.begun, self.quoted = bool(text), text.startswith('"')
        for place, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = char == "\\"
                self._quoted = char != '"'
                self.done = not self._quoted and not self._depth
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                self.done = self._depth <= 0
                if self._depth < 0:  # the end of what holds a number, true, false or null
                    return text[:place]
            if self.done:
                return text[: place + 1]
        return text
