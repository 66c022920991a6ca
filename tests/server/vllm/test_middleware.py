"""What stands before vLLM's application, over a stand-in for it."""

from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from pvrt_server.opened import open_model
from pvrt_server.options import ServeOptions
from pvrt_server.vllm.middleware import Frontend, frontend_environment


def set_variables(folder: Path, options: ServeOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process of vLLM's server is started with."""
    for name, value in frontend_environment(open_model(folder), options).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def guarded(toy: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """An application as vLLM builds it: middleware by class, without arguments."""
    set_variables(toy, ServeOptions(api_key="secret"), monkeypatch)
    paths = ("/health", "/metrics", "/invocations", "/v1/models", "/tokenize")
    methods = ["GET", "OPTIONS"]
    app = Starlette(
        routes=[Route(p, lambda _: PlainTextResponse("from vLLM"), methods=methods) for p in paths]
    )
    app.add_middleware(Frontend)
    return TestClient(app, base_url="http://localhost")


@pytest.fixture
def client(toy: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The same without a key, over routes that answer as vLLM's do."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    set_variables(toy, ServeOptions(), monkeypatch)

    async def models(request: Request) -> Response:
        if failure := request.headers.get("X-Failure"):
            return JSONResponse({"detail": failure}, 503, {"Retry-After": "7"})
        return JSONResponse({"object": "list", "data": [{"id": "org/m", "max_model_len": 9}]})

    async def good(request: Request) -> Response:
        return JSONResponse({"detail": "no error"})

    async def parsing(request: Request) -> Response:
        return JSONResponse({"detail": "There was an error parsing the body"}, 400)

    async def own(request: Request) -> Response:
        error = {"message": "no", "type": "BadRequestError", "param": "n", "code": 400}
        return JSONResponse({"error": error}, 400)

    app = FastAPI()
    for path, endpoint in {
        "/v1/models": models,
        "/good": good,
        "/parsing": parsing,
        "/own": own,
    }.items():
        app.add_route(path, endpoint, methods=["GET"])
    app.add_middleware(Frontend)
    return TestClient(app, base_url="http://localhost")


def test_a_model_is_found_by_its_name(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "org/m"
    assert client.get("/v1/models/org/m").json() == {"id": "org/m", "max_model_len": 9}
    refusal = client.get("/v1/models/other")
    assert refusal.status_code == 404
    assert refusal.json()["error"]["code"] == "model_not_found"
    assert "'org/m'" in refusal.json()["error"]["message"]


def test_a_list_of_models_that_fails_says_so_for_one_model_too(client: TestClient) -> None:
    for path in ("/v1/models", "/v1/models/org/m"):
        refusal = client.get(path, headers={"X-Failure": "the engine is dead"})
        assert refusal.status_code == 503
        assert refusal.headers["Retry-After"] == "7"
        assert refusal.json()["error"]["message"] == "the engine is dead"


def test_errors_of_every_route_have_one_form(client: TestClient) -> None:
    unknown = client.get("/v1/v1/models")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "route_not_found")
    assert "/v1/v1/models" in unknown.json()["error"]["message"]
    method = client.post("/good")
    assert method.status_code == 405
    assert method.json()["error"]["code"] == "method_not_allowed"
    assert method.headers["Allow"]
    parsing = client.get("/parsing").json()["error"]
    assert parsing["message"] == "There was an error parsing the body"
    # What has the form already, and what is no error, stays.
    assert client.get("/own").json()["error"]["param"] == "n"
    assert client.get("/good").json() == {"detail": "no error"}


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


def test_a_page_whose_name_leads_here_is_not_answered(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200
    refused = client.get("/v1/models", headers={"Host": "attacker.example"})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "forbidden_host"
