"""What vLLM keeps of responses is bounded, over a stand-in for its application."""

from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from pvrt_server.capacity import installed_vllm
from pvrt_server.vllm import response_stores
from pvrt_server.vllm.response_stores import STORE_VARIABLE, STORES, ResponseStores


def test_the_newest_responses_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_stores, "MOST_RESPONSES", 3)
    serving = SimpleNamespace(response_store={}, msg_store={})  # no events: nothing streamed yet

    async def respond(request: Request) -> Response:
        name = (await request.body()).decode()
        serving.response_store[name] = serving.msg_store[name] = "kept"
        return PlainTextResponse(name)

    app = Starlette(routes=[Route("/v1/responses", respond, methods=["POST"])])
    app.state.openai_serving_responses = serving
    app.add_middleware(ResponseStores)
    client = TestClient(app)
    for name in "abcde":
        assert client.post("/v1/responses", content=name).text == name
    assert list(serving.response_store) == list(serving.msg_store) == ["c", "d", "e"]
    assert client.get("/none").status_code == 404


def test_vllm_keeps_them_under_these_names() -> None:
    folder = installed_vllm()
    if folder is None:
        pytest.skip("vLLM is not installed")
    said = (folder / "entrypoints/openai/responses/serving.py").read_text(encoding="utf-8")
    assert [name for name in STORES if f"self.{name}: dict[" not in said] == []
    assert STORE_VARIABLE in (folder / "envs.py").read_text(encoding="utf-8")
    router = (folder / "entrypoints/openai/responses/api_router.py").read_text(encoding="utf-8")
    assert "app.state.openai_serving_responses" in router
