"""The module that runs vLLM's server: requests that never end are closed, whatever is in them."""

import runpy
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvicorn.config
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from pvrt_server.opened import open_model
from pvrt_server.options import ServeOptions
from pvrt_server.vllm import server as vllm_server
from pvrt_server.vllm.middleware import Frontend, frontend_environment
from tests.server.running import PATIENCE, post_bytes, wait_until


async def length(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def port(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Where a stand-in for vLLM's application is served, as vLLM serves its own."""
    options = ServeOptions(request_seconds=0.3, max_body_bytes=1000)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for name, value in frontend_environment(open_model(toy), options).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", None)  # put back afterwards
    servers: list[uvicorn.Server] = []

    def run_module(name: str, **_: Any) -> None:
        assert name == "vllm.entrypoints.openai.api_server"
        app = Starlette(routes=[Route("/", length, methods=["POST"])])
        app.add_middleware(Frontend)
        servers.append(uvicorn.Server(uvicorn.Config(app, port=0, log_level="error")))

    monkeypatch.setattr(runpy, "run_module", run_module)
    vllm_server.main()
    thread = threading.Thread(target=servers[0].run, daemon=True)
    thread.start()
    wait_until(lambda: servers[0].started)
    yield servers[0].servers[0].sockets[0].getsockname()[1]
    servers[0].should_exit = True
    thread.join(PATIENCE)


def sent(port: int, data: bytes) -> bytes:
    """What comes back until the server closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(data)
        while piece := connection.recv(65536):
            received += piece
    return received


def test_bodies_and_headers_have_a_deadline_and_a_size_under_vllm_too(port: int) -> None:
    whole = post_bytes("/", b"12345")
    assert sent(port, whole).endswith(b"\r\n\r\n5")
    for start in (b"", b"POST / HTTP/1.1\r\nHost: localhost\r\n"):
        assert sent(port, start) == b""
    late = sent(port, whole[:-1])
    assert late.startswith(b"HTTP/1.1 408") and b"was not there within 0.3 seconds" in late
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    large = b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n" + b" " * 2000 + b"\r\n0\r\n\r\n"
    assert sent(port, head + large).startswith(b"HTTP/1.1 413")
    assert sent(port, whole).endswith(b"\r\n\r\n5")
