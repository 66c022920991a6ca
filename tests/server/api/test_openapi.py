"""The server's own OpenAPI document, and requests that schemathesis makes up from it."""

from pathlib import Path

import pytest

from tests.server.made_up import try_operations
from tests.server.running import scripted_engine, serving

OPERATIONS = {
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{name}"),
    ("DELETE", "/v1/responses/{name}"),
    ("GET", "/v1/responses/{name}/input_items"),
    ("GET", "/tokenizer_info"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
}


@pytest.mark.slow
def test_made_up_requests_never_break_the_server(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "ok")
    with serving(engine) as server:
        assert try_operations(server.url, None, 12, {}) == OPERATIONS
        assert server.get("/health").status_code == 200


def test_endpoints_that_are_not_there_say_which_are(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "ok")
    with serving(engine) as server:
        response = server.post("/v1/embeddings", {"model": "toy", "input": "Hello"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "route_not_found"
    assert "POST /v1/chat/completions" in response.json()["error"]["message"]
