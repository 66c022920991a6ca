"""One request's events in the event loop, and its end when the client leaves."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request

from pvrt_server.engine.engine import Engine, Event, FailureEvent
from pvrt_server.engine.sequences import GenerationRequest, PromptEvent, TokenEvent


class ClientGone(Exception):
    """The client closed the connection; nobody waits for the answer."""


class Generation:
    """A submitted job. Iterate `events` once; it is cancelled when that ends or the client leaves.

    Raises what `Engine.submit` raises. Create it after the request's body has been read.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[GenerationRequest], request: Request
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._unfinished = len(requests)
        self._job = engine.submit(requests, self._receive)
        self._watch = self._loop.create_task(self._cancel_on_disconnect(request))

    def _receive(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _cancel_on_disconnect(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._job.cancel()
        self._events.put_nowait(None)

    async def events(
        self, idle_seconds: float | None = None
    ) -> AsyncIterator[PromptEvent | TokenEvent | None]:
        """Events to the last; None whenever there was none for idle_seconds.

        Raises ClientGone, GenerationError and EngineStoppedError.
        """
        try:
            while self._unfinished:
                try:
                    async with asyncio.timeout(idle_seconds):
                        event = await self._events.get()
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    raise ClientGone
                if isinstance(event, FailureEvent):
                    raise event.error
                self._unfinished -= event.finish_reason is not None
                yield event
        finally:
            self._watch.cancel()
            self._job.cancel()
