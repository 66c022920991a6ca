"""What POST /v1/responses answers: items that grow, and the events that tell of it."""

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from pvrt_server.api.response_requests import Item, ResponseRequest
from pvrt_server.api.responses import Delta, Usage

Event = dict[str, Any]


def event_bytes(event: Event) -> bytes:
    """One server-sent event, ASCII only, with its type as its name."""
    data = json.dumps(event, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode("ascii")


class ResponseOutput:
    """One response under way."""

    def __init__(self, model: str, body: ResponseRequest, usage: Usage) -> None:
        self._usage = usage
        self._items: list[Item] = []
        self._reasoning_events = 0
        self._open: Item | None = None
        self._calls: dict[int, Item] = {}
        self._number = 0
        extra = body.model_extra or {}
        self.body: dict[str, Any] = {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": extra.get("metadata") or {},
            "model": model,
            "output": self._items,
            "parallel_tool_calls": extra.get("parallel_tool_calls") is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
            "store": body.store is not False,
            "temperature": extra.get("temperature"),
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": extra.get("top_p"),
            "truncation": "disabled",
            "usage": None,
            "user": extra.get("user"),
        }

    def begin(self) -> Iterator[Event]:
        """The events before any token."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._snapshot())

    def add(self, delta: Delta) -> Iterator[Event]:
        """What a part of the answer tells."""
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning)
        if delta.text:
            yield from self._grow("message", delta.text)
        for call in delta.calls:
            if call.name is not None:
                yield from self._start(_call(call.name))
                self._calls[call.number] = self._items[-1]
            if call.arguments:
                item = self._calls[call.number]
                item["arguments"] += call.arguments
                kind = "response.function_call_arguments.delta"
                yield self._event(kind, **self._place(item), delta=call.arguments)

    def end(self, finish_reason: str) -> Iterator[Event]:
        """The events after the last token; `body` is whole then."""
        if not self._items:
            yield from self._start(_message())
        complete = finish_reason != "length"
        status = "completed" if complete else "incomplete"
        yield from self._finish(status)
        if not complete:
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self._close(status)

    def fail(self, message: str) -> Iterator[Event]:
        """The events of an answer that broke."""
        yield from self._finish("incomplete")
        self.body["error"] = {"code": "server_error", "message": message}
        yield self._close("failed")

    def _close(self, status: str) -> Event:
        used = self._usage
        self.body["status"] = status
        self.body["usage"] = {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": used.cached_tokens},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_events},
            "total_tokens": used.prompt_tokens + used.completion_tokens,
        }
        return self._event(f"response.{status}", response=self._snapshot())

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        """More text for the item under way, or for a new one."""
        if self._open is None or self._open["type"] != kind:
            yield from self._start(_message() if kind == "message" else _reasoning())
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        more: Item = {"logprobs": []} if kind == "message" else {}
        self._reasoning_events += kind == "reasoning"
        yield self._event(
            f"response.{part['type']}.delta", **self._part_place(self._open), delta=text, **more
        )

    def _start(self, item: Item) -> Iterator[Event]:
        yield from self._finish("completed")
        self._items.append(item)
        self._open = item
        empty = {**item, "content": []} if "content" in item else item
        place = {"output_index": len(self._items) - 1}
        yield self._event("response.output_item.added", **place, item=_copy(empty))
        if "content" in item:
            part = _copy(item["content"][0])
            place = self._part_place(item)
            yield self._event("response.content_part.added", **place, part=part)

    def _finish(self, status: str) -> Iterator[Event]:
        """End the item under way."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            kind = "response.function_call_arguments.done"
            yield self._event(kind, **self._place(item), **told)
        else:
            part = item["content"][0]
            place = self._part_place(item)
            more: Item = {"logprobs": []} if item["type"] == "message" else {}
            yield self._event(f"response.{part['type']}.done", **place, text=part["text"], **more)
            yield self._event("response.content_part.done", **place, part=_copy(part))
        index = self._place(item)["output_index"]
        yield self._event("response.output_item.done", output_index=index, item=_copy(item))

    def _event(self, kind: str, **fields: Any) -> Event:
        number = self._number
        self._number += 1
        return {"type": kind, "sequence_number": number, **fields}

    def _place(self, item: Item) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": self._items.index(item)}

    def _part_place(self, item: Item) -> dict[str, Any]:
        return {**self._place(item), "content_index": 0}

    def _snapshot(self) -> dict[str, Any]:
        return {**self.body, "output": [_copy(item) for item in self._items]}


def all_events(events: Iterable[Event]) -> None:
    """Let events happen that nobody hears of."""
    for _ in events:
        pass


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _message() -> Item:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {
        "id": _new_id("msg"),
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [part],
    }


def _reasoning() -> Item:
    part = {"type": "reasoning_text", "text": ""}
    return {
        "id": _new_id("rs"),
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [part],
    }


def _call(name: str) -> Item:
    return {
        "id": _new_id("fc"),
        "type": "function_call",
        "status": "in_progress",
        "call_id": f"call_{uuid.uuid4().hex[:24]}",
        "name": name,
        "arguments": "",
    }


def _copy(item: Item) -> Item:
    """An item that later events do not change."""
    if "content" not in item:
        return dict(item)
    return {**item, "content": [dict(part) for part in item["content"]]}
