"""A server tested with sockets and bytes, for `server_clients.py`; the standard library alone."""

import http.client
import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

SECONDS = 120
LEAVING = 1000


@dataclass(frozen=True)
class Where:
    """The server under test."""

    url: str
    model: str
    key: str


Feature = tuple[str, Callable[[], None]]


def expect(condition: object, problem: str = "not as expected") -> None:
    """Fail a feature with a reason."""
    if not condition:
        raise AssertionError(problem)


def raw(where: Where, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    """One request with the key: status and body."""
    headers = {"Authorization": f"Bearer {where.key}", "Content-Type": "application/json"}
    request = urllib.request.Request(where.url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def raw_http(where: Where) -> Iterator[Feature]:
    """Sockets and bytes: what no library sends, and what it does not show."""
    address = (str(urlsplit(where.url).hostname), int(urlsplit(where.url).port or 80))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {where.key}\r\n"
        "Content-Type: application/json\r\n"
    )
    good = json.dumps({"model": where.model, "prompt": "a b", "max_tokens": 4}).encode()

    def send(data: bytes, wait: bool = True) -> str:
        with socket.create_connection(address, SECONDS) as connection:
            connection.sendall(data)
            if not wait:
                return ""
            return connection.recv(65536).decode("utf-8", "replace")

    def alive() -> None:
        status, text = raw(where, "POST", "/v1/completions", good)
        expect(status == 200, f"{status} {text[:100]}")

    def envelope(status: int, found: tuple[int, str]) -> None:
        expect(found[0] == status, f"{found[0]} {found[1][:100]}")
        error = json.loads(found[1])["error"]
        expect({"message", "type", "param", "code"} <= error.keys(), str(error))

    def framing() -> None:
        body = json.dumps({**json.loads(good), "stream": True}).encode()
        text = raw(where, "POST", "/v1/completions", body)[1]
        expect(text.endswith("data: [DONE]\n\n"))
        events = [part for part in text.split("\n\n") if part and not part.startswith(":")]
        expect(all(event.startswith("data: ") and "\n" not in event for event in events))

    def chunked() -> None:
        size = f"{len(good):x}".encode()
        body = size + b"\r\n" + good + b"\r\n0\r\n\r\n"
        answer = send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + body)
        expect(" 200 " in answer, answer[:100])

    def kept() -> None:
        connection = http.client.HTTPConnection(*address, timeout=SECONDS)
        headers = {"Authorization": f"Bearer {where.key}", "Content-Type": "application/json"}
        opened = []
        for _ in range(2):
            connection.request("POST", "/v1/completions", good, headers)
            opened.append(connection.sock)
            answer = connection.getresponse()
            expect(answer.status == 200 and answer.read())
        expect(opened[0] is opened[1], "a new connection for the second request")
        connection.close()

    def half() -> None:
        for _ in range(20):
            send(f"{head}Content-Length: 4000\r\n\r\n".encode() + good, wait=False)
        alive()

    def leaving() -> None:
        body = json.dumps({**json.loads(good), "stream": True, "max_tokens": 200}).encode()
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        for number in range(LEAVING):
            with socket.create_connection(address, SECONDS) as connection:
                if number % 3 == 0:  # in the middle of a request
                    connection.sendall(request[: number % len(request)])
                    continue
                connection.sendall(request)
                if number % 10 == 1:  # in the middle of an answer
                    connection.recv(64)
        nothing_left()
        alive()

    def nothing_left() -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            text = raw(where, "GET", "/metrics")[1]
            counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\b\S* (\S+)$", text, re.M)
            if counts and not any(map(float, counts)):
                return
            time.sleep(0.1)
        expect(False, f"running and waiting: {counts}")

    def no_http() -> None:
        for junk in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 300):
            with socket.create_connection(address, SECONDS) as connection:
                connection.sendall(junk)
        alive()

    def large() -> None:
        answer = send(f"{head}Content-Length: {1 << 40}\r\n\r\n".encode())
        expect(" 413 " in answer, answer[:100])
        alive()

    def metrics() -> None:
        text = raw(where, "GET", "/metrics")[1]
        names = (
            *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
            *("time_to_first_token_seconds", "inter_token_latency_seconds"),
            *("prompt_tokens_total", "generation_tokens_total", "request_success_total"),
        )
        lacking = [name for name in names if f"vllm:{name}" not in text]
        expect(not lacking, f"no {', '.join(lacking)}")

    def bad_body(content: bytes) -> Callable[[], None]:
        return lambda: envelope(400, raw(where, "POST", "/v1/completions", content))

    def no_key() -> None:
        found = raw(Where(where.url, where.model, "wrong"), "GET", "/metrics")
        envelope(401, found)

    yield from {
        "stream: framing": framing,
        "chunked body": chunked,
        "connection kept alive": kept,
        "half requests": half,
        f"{LEAVING:,} clients that leave": leaving,
        "no HTTP at all": no_http,
        "body too large: 413": large,
        "no JSON: 400": bad_body(b"{"),
        "bad UTF-8: 400": bad_body(b'{"prompt": "\xff\xfe"}'),
        "no object: 400": bad_body(b"[1]"),
        "unknown route: 404": lambda: envelope(404, raw(where, "GET", "/v1/v1/models")),
        "wrong method: 405": lambda: envelope(405, raw(where, "GET", "/v1/completions")),
        "no key: 401 beyond /v1": no_key,
        "metrics: vLLM's names": metrics,
        "version": lambda: expect(raw(where, "GET", "/version")[0] == 200),
        "page": lambda: expect("<title>" in raw(where, "GET", "/")[1]),
    }.items()
