"""What stands before vLLM's application, over a stand-in for it."""

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from pvrt_server.frontend import Frontend


@pytest.fixture
def guarded(toy: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """An application as vLLM builds it: middleware by class, without arguments."""
    monkeypatch.setenv("PVRT_SERVED_FOLDER", str(toy))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    paths = ("/health", "/metrics", "/invocations", "/v1/models", "/tokenize")
    methods = ["GET", "OPTIONS"]
    app = Starlette(
        routes=[Route(p, lambda _: PlainTextResponse("from vLLM"), methods=methods) for p in paths]
    )
    app.add_middleware(Frontend)
    return TestClient(app)


def test_the_key_guards_what_vllm_leaves_open(guarded: TestClient) -> None:
    for path in ("/metrics", "/invocations", "/v1/models", "/tokenize", "/pvrt/status", "/none"):
        refusal = guarded.get(path)
        assert refusal.status_code == 401, path
        assert refusal.json()["error"]["code"] == "invalid_api_key"
        assert guarded.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert guarded.get("/health").text == "from vLLM"
    assert "<title>" in guarded.get("/").text
    headers = {"Authorization": "Bearer secret"}
    assert guarded.get("/metrics", headers=headers).text == "from vLLM"
    assert guarded.get("/pvrt/status", headers=headers).json()["model"]["scheme"] == "2x8g8"
    # A browser asks without the key whether it may send it.
    assert guarded.options("/v1/models").text == "from vLLM"
    # The page is one path, not a prefix.
    assert guarded.get("//v1/models").status_code == 401
