"""OpenAI's Responses API over the chat path: create, stream, look up, delete."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from pvrt_server.api.chat import Chat, prepare
from pvrt_server.api.generation import ClientGone, Generation
from pvrt_server.api.response_events import ResponseOutput, all_events, event_bytes
from pvrt_server.api.response_requests import Item, ResponseRequest, ResponseStore, Stored
from pvrt_server.api.responses import KEEP_ALIVE
from pvrt_server.api.streaming import SSE_HEADERS, Responder
from pvrt_server.errors import EngineStoppedError, GenerationError, RequestError


@dataclass(frozen=True)
class ResponseRoutes:
    """The endpoints. check_model raises where a request names another model."""

    responder: Responder
    check_model: Callable[[str | None], None]
    store: ResponseStore = field(default_factory=ResponseStore)

    async def create(self, body: ResponseRequest, request: Request) -> Response:
        """POST /v1/responses."""
        self.check_model(body.model)
        try:
            conversation = self.store.conversation(body)
            chat_request = body.chat(conversation)
            chat = await asyncio.to_thread(prepare, self.responder.engine, chat_request)
            generation = Generation(self.responder.engine, chat.requests, request)
        except RequestError as error:
            if error.param is not None and error.param.startswith(("messages", "prompt")):
                error.param = "input"
            raise
        output = ResponseOutput(self.responder.name, body, chat.usage)

        def keep() -> None:
            if body.store is not False:
                # As they are now: nothing of a request or an answer changes later.
                items: list[Item] = [*conversation, *output.body["output"]]
                self.store.add(Stored(output.body, body.items(), items))

        if body.stream:
            chunks = self._stream(generation, chat, output, keep)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=SSE_HEADERS)
        all_events(output.begin())
        async for event in generation.events():
            if event is None:
                continue
            chat.usage.count(event)
            for delta in chat.serializer.deltas(event):
                all_events(output.add(delta))
                if delta.finish_reason is not None:
                    all_events(output.end(delta.finish_reason))
        keep()
        return JSONResponse(output.body)

    async def _stream(
        self, generation: Generation, chat: Chat, output: ResponseOutput, keep: Callable[[], None]
    ) -> AsyncIterator[bytes]:
        for told in output.begin():
            yield event_bytes(told)
        try:
            async for event in generation.events(self.responder.keep_alive_seconds):
                if event is None:
                    yield KEEP_ALIVE
                    continue
                chat.usage.count(event)
                for delta in chat.serializer.deltas(event):
                    for told in output.add(delta):
                        yield event_bytes(told)
                    if delta.finish_reason is None:
                        continue
                    last = list(output.end(delta.finish_reason))
                    keep()  # before the client hears of it: it may go on at once
                    for told in last:
                        yield event_bytes(told)
        except (GenerationError, EngineStoppedError) as error:
            for told in output.fail(str(error)):
                yield event_bytes(told)
        except ClientGone:
            return

    async def get(self, name: str) -> dict[str, Any]:
        """GET /v1/responses/ID."""
        return self._stored(name).body

    async def input_items(self, name: str) -> dict[str, Any]:
        """GET /v1/responses/ID/input_items."""
        items = self._stored(name).given
        return {"object": "list", "data": items, "has_more": False}

    async def delete(self, name: str) -> dict[str, Any]:
        """DELETE /v1/responses/ID."""
        self._stored(name)
        self.store.remove(name)
        return {"id": name, "object": "response", "deleted": True}

    def _stored(self, name: str) -> Stored:
        stored = self.store.get(name)
        if stored is None:
            raise HTTPException(404)
        return stored
