"""Bytes that no client should send, and many that send them: never a 5xx, never a dead server."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.server.running import Server, post_bytes, scripted_engine, serving, wait_until

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def target(toy: Path) -> Iterator[Server]:
    engine, _ = scripted_engine(toy, "one two three")
    with serving(engine) as running:
        yield running
        assert running.post(COMPLETIONS, {"prompt": "ab"}).status_code == 200  # it lives


def raw(server: Server, data: bytes, *, end: bool = False) -> bytes:
    """Send bytes, and the end of all if asked; what comes back until the server closes.

    Where it closes on bytes that it has not read, the system resets the connection.
    """
    received = b""
    with server.connect() as connection, suppress(ConnectionError):
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            received += piece
    return received


DEEP = b"[" * 200_000
BODIES = {
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "half JSON": b'{"prompt": "a',
    "deep JSON": b'{"prompt": ' + DEEP,
    "deep value": b'{"prompt": "a", "metadata": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
    "a huge number": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    "a large exponent": b'{"prompt": "a", "temperature": 1e999}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "a list": b"[1, 2]",
    "a string": b'"prompt"',
    "null": b"null",
    "nothing": b"",
    "a null byte": b'{"prompt": "a\\u0000b", "max_tokens": 1}',
    "an unknown field": b'{"prompt": "a", "\\u0000": 1}',
    "two prompts": b'{"prompt": "a", "prompt": 3}',
    "a token too large": b'{"prompt": [1e30]}',
    "a negative token": b'{"prompt": [-9223372036854775809]}',
    "a deep schema": b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": '
    b'{"schema": ' + b'{"items":' * 300 + b"{}" + b"}" * 302 + b"}",
    "endless stops": b'{"prompt": "a", "stop": ' + json.dumps(["x" * 50] * 3000).encode() + b"}",
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/tokenize"])
def test_bodies_of_all_kinds_get_an_answer_that_is_no_5xx(
    target: Server, name: str, path: str
) -> None:
    answer = raw(target, post_bytes(path, BODIES[name]))
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status in (200, 400, 413), answer
    if status != 200:
        assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: [::1]\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 1000\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models/%ff%00%2e%2e%2f HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [::1]\r\nAuthorization: \xff\xfe\r\nConnection: close\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_do_no_harm(target: Server, data: bytes) -> None:
    answer = raw(target, data, end=True)
    assert not answer or not answer.split()[1].startswith(b"5"), answer
    assert target.get("/health").status_code == 200


def test_a_body_that_never_ends_is_refused_and_thrown_away(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "ok")
    with serving(engine, max_body_bytes=100_000) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
        piece = b"2710\r\n" + b" " * 10_000 + b"\r\n"
        with server.connect() as connection:
            connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + piece * 11)
            assert connection.recv(65536).startswith(b"HTTP/1.1 413")
            with suppress(ConnectionError):  # it may have closed by now
                connection.sendall(piece * 1000)  # would wait for ever, were nothing read
        assert server.post(COMPLETIONS, {"prompt": "ab"}).status_code == 200


def test_clients_that_leave_in_the_middle_leave_nothing_behind(toy: Path) -> None:
    clients = 200
    engine, _ = scripted_engine(toy, "x" * 400, max_requests=clients + 1)
    request = post_bytes(COMPLETIONS, b'{"prompt": "ab", "max_tokens": 400, "stream": true}')
    with serving(engine) as server:

        def abuse(number: int) -> None:
            with server.connect() as connection:
                whole = number % 3 != 0
                connection.sendall(request if whole else request[:number])
                if whole and number % 2:
                    connection.recv(100)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(abuse, range(clients)))
        assert server.post(COMPLETIONS, {"prompt": "ab", "max_tokens": 2}).status_code == 200
        wait_until(lambda: engine.running == 0 and engine.waiting == 0)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea",  # after a whole one
        post_bytes(COMPLETIONS, b'{"prompt": "ab"}')[:-3],
    ],
)
def test_a_request_that_never_ends_is_closed(toy: Path, start: bytes) -> None:
    engine, _ = scripted_engine(toy, "ok")
    with serving(engine, request_seconds=0.2) as server:
        answer = raw(server, start)  # returns when the server closes
        assert (b" 408 " in answer) == start.startswith(b"POST"), answer
        assert server.post(COMPLETIONS, {"prompt": "ab"}).status_code == 200


def test_an_answer_may_take_longer_than_its_request(toy: Path) -> None:
    engine, model = scripted_engine(toy, "ok", max_requests=4)
    with serving(engine, request_seconds=0.1) as server:
        model.gate.clear()
        threading.Timer(0.5, model.gate.set).start()
        assert server.post(COMPLETIONS, {"prompt": "ab"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "options", "status"),
    [
        ("attacker.example", {}, 403),
        ("attacker.example:8000", {}, 403),
        ("localhost.attacker.example", {}, 403),
        ("", {}, 200),
        ("localhost:8000", {}, 200),
        ("app.localhost", {}, 200),
        ("127.0.0.1:8000", {}, 200),
        ("[::1]:8000", {}, 200),
        ("192.168.0.7", {}, 200),
        ("box.example", {"allowed_hosts": "box.example, b.example"}, 200),
        ("B.example:1", {"allowed_hosts": "box.example, b.example"}, 200),
        ("attacker.example", {"allowed_hosts": "box.example"}, 403),
        ("attacker.example", {"host": "0.0.0.0"}, 200),
        ("attacker.example", {"host": "0.0.0.0", "allowed_hosts": "box.example"}, 403),
        ("attacker.example", {"api_key": "k"}, 401),
    ],
)
def test_pages_whose_names_lead_here_are_not_answered(
    toy: Path, host: str, options: dict[str, Any], status: int
) -> None:
    engine, _ = scripted_engine(toy, "ok")
    with serving(engine, **options) as server:
        head = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        assert int(raw(server, head.encode()).split()[1]) == status
