"""`pvrt serve FOLDER`: open the folder, decide how to serve it, then run vLLM or the embedded
engine."""

import logging
import socket
from contextlib import closing
from pathlib import Path

from pvrt.errors import ServeError
from pvrt_server.backend import choose_backend
from pvrt_server.capacity import this_machine
from pvrt_server.opened import OpenedModel, open_model
from pvrt_server.options import ServeOptions
from pvrt_server.self_test import Target, report, run_checks
from pvrt_server.snippets import snippets
from pvrt_server.vllm.process import serve_vllm

_log = logging.getLogger("pvrt_server")
_LOG_FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def serve(folder: Path, options: ServeOptions) -> int:
    """Serve a model folder until SIGINT or SIGTERM; returns the exit code.

    With options.check the server is tested when it is ready, a table printed, and the server ended:
    the exit code is 0 if all passed. Raises CheckpointError for a folder that is not sound and
    ServeError for what cannot be served as asked, before anything is loaded.
    """
    logging.basicConfig(level=options.log_level.upper(), format=_LOG_FORMAT)
    opened = open_model(folder.resolve())
    _warn(opened, options)
    decision = choose_backend(opened, options, this_machine(options.gpus))
    with closing(_bind(options)) as listener:
        options = options.changed(port=listener.getsockname()[1])
        ready = _Check(opened, options) if options.check else _Announcement(opened, options)
        print(f"{decision.report(options.name(opened.path))}\n", flush=True)
        if decision.backend == "local":
            from pvrt_server.api.local_server import serve_local

            return ready.exit_code(serve_local(opened, options, decision, listener, ready))
    return ready.exit_code(serve_vllm(opened, options, decision, ready))


class _Announcement:
    """Called when the server is ready: prints where it is and what to paste."""

    def __init__(self, opened: OpenedModel, options: ServeOptions) -> None:
        self._name = options.name(opened.path)
        self._url = options.url
        self._keyed = options.api_key is not None
        self._chat = opened.chats

    def __call__(self) -> bool:
        print(f"\n{self._name} is served at {self._url}/v1")
        print(f"chat with it in the browser: {self._url}/")
        print(snippets(self._url, self._name, keyed=self._keyed, chat=self._chat), flush=True)
        return False

    def exit_code(self, server: int) -> int:
        """The server's own."""
        return server


class _Check:
    """Called when the server is ready: tests it, prints the table, and has it ended."""

    def __init__(self, opened: OpenedModel, options: ServeOptions) -> None:
        chat = opened.chats
        self._target = Target(options.url, options.name(opened.path), options.api_key, chat)
        self._passed: bool | None = None

    def __call__(self) -> bool:
        self._passed = report(run_checks(self._target))
        return True

    def exit_code(self, server: int) -> int:
        """0 if all passed, 1 if one failed, the server's where it never was ready."""
        if self._passed is None:
            return server or 1
        return 0 if self._passed else 1


def _warn(opened: OpenedModel, options: ServeOptions) -> None:
    """Say what may be meant but is seldom wanted."""
    if not opened.chats:
        _log.warning(
            "%s has no chat template: /v1/completions works, /v1/chat/completions will not until "
            "the original model's chat_template.jinja is copied into the folder",
            opened.path,
        )
    if options.api_key is None and not options.local:
        _log.warning("%s can be reached by others and there is no --api-key", options.host)


def _bind(options: ServeOptions) -> socket.socket:
    """A bound socket, not yet listening, so that nobody else takes the port while we load."""
    host, port = options.host, options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ServeError(f"{host} is no address of this machine; try --host 127.0.0.1") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host} port {port} ({error.strerror}); stop what is using it or "
            f"try --port {port + 1 if port < 65535 else 8000}"
        ) from error
    return listener
