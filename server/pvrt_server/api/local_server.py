"""The embedded engine behind uvicorn: its start, the signals that end it, and its exit code."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from pvrt_server.api.app import create_app
from pvrt_server.api.connection import protocol
from pvrt_server.backend import Decision
from pvrt_server.engine.engine import Engine
from pvrt_server.opened import OpenedModel
from pvrt_server.options import GRACE_SECONDS, KEEP_ALIVE_SECONDS, ServeOptions


def serve_local(
    opened: OpenedModel,
    options: ServeOptions,
    decision: Decision,
    listener: socket.socket,
    on_ready: Callable[[], bool],
) -> int:
    """Serve on a bound socket until SIGINT or SIGTERM; returns the exit code.

    on_ready is called once, in a thread, when the server answers; True ends it. Raises
    CheckpointError and ServeError where the model cannot be loaded.
    """
    with Engine.start(opened, options, decision) as engine:
        server = _Server(engine, options, on_ready)
        engine.on_broken = server.give_up  # whoever started us may start us again
        with _signals_ignored_afterwards():
            server.run(sockets=[listener])
    return 0 if server.started and engine.failure is None else 1


class _Server(uvicorn.Server):
    def __init__(self, engine: Engine, options: ServeOptions, on_ready: Callable[[], bool]) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(engine, options),
                http=protocol(options.request_seconds),
                log_level=options.log_level,
                access_log=not options.check,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(GRACE_SECONDS) + 5,
            )
        )
        self._engine = engine
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            threading.Thread(target=self._tell, daemon=True).start()

    def give_up(self) -> None:
        """End as soon as possible. Safe in any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.stop(GRACE_SECONDS)
        super().handle_exit(sig, frame)

    def _tell(self) -> None:
        if self._on_ready():
            self.give_up()


@contextmanager
def _signals_ignored_afterwards() -> Iterator[None]:
    """uvicorn raises a signal again once it has shut down, for whoever handled it before."""
    handlers = {s: signal.signal(s, _ignore) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A signal that has done its work."""
