"""Calls of pages of other origins, HEAD, and paths that end in a slash."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.running import PATIENCE, Server, scripted_engine, serving

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
ORIGIN = "http://localhost:3000"
KEY = {"Authorization": "Bearer k"}


@pytest.fixture(scope="module")
def opened(toy: Path) -> Iterator[Server]:
    """A server with a key that pages of one origin may call."""
    engine, _ = scripted_engine(toy, "Hi")
    with serving(engine, api_key="k", allowed_origins=ORIGIN) as running:
        yield running


def preflight(server: Server, path: str, origin: str) -> httpx.Response:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return httpx.options(f"{server.url}{path}", headers=asked, timeout=PATIENCE)


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/v1/responses"])
def test_a_browser_may_ask_and_call_from_an_allowed_origin(opened: Server, path: str) -> None:
    answer = preflight(opened, path, ORIGIN)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "x-stainless-os" in answer.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Origin" not in preflight(opened, path, "http://evil").headers


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"messages": HELLO}, KEY, 200),
        ({"messages": HELLO, "stream": True}, KEY, 200),
        ({"messages": 1}, KEY, 400),
        ({"messages": HELLO}, {}, 401),
    ],
)
def test_every_answer_can_be_read_there(
    opened: Server, body: Any, headers: dict[str, str], status: int
) -> None:
    answer = opened.post(CHAT, body, headers={"Origin": ORIGIN, **headers})
    assert answer.status_code == status
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN


def test_no_other_origin_is_allowed_unless_asked_for(says: Server) -> None:
    answer = says.post(CHAT, {"messages": HELLO}, headers={"Origin": ORIGIN})
    assert answer.status_code == 200
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Access-Control-Allow-Origin" not in preflight(says, CHAT, ORIGIN).headers


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/toy", "/"])
def test_head_is_get_without_a_body(says: Server, path: str) -> None:
    head = httpx.head(f"{says.url}{path}", timeout=PATIENCE)
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["Content-Length"] == says.get(path).headers["Content-Length"]


def test_a_slash_at_the_end_changes_nothing(says: Server) -> None:
    answer = says.post(f"{CHAT}/", {"messages": HELLO})
    assert answer.json()["choices"][0]["message"]["content"] == "one two three 😀 four"
    assert says.get("/v1/models/").json()["data"][0]["id"] == "toy"
    assert says.get("/health//").status_code == 200


def test_a_slash_opens_nothing(opened: Server) -> None:
    assert opened.get("/v1/models/").status_code == 401
    assert opened.get("/health/").status_code == 200


def test_the_tokenizer_tells_its_template_and_special_tokens(says: Server) -> None:
    info = says.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>"
    assert "messages" in info["chat_template"]
    assert info["model_max_length"] == 512
