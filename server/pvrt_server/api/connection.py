"""Connections of the embedded engine's server, which are closed on those that never ask."""

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol


def protocol(request_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with a deadline for the headers of each request.

    uvicorn has one only for those who have asked before and send nothing.
    """

    class Connection(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the clock while headers are awaited, stop it when they are there."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(request_seconds, self.transport.close)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Connection
