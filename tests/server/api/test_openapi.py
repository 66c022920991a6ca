"""The server's own OpenAPI document, and requests that schemathesis makes up from it."""

from pathlib import Path
from typing import Any

import pytest

from tests.server.running import PATIENCE, scripted_engine, serving

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
    import hypothesis
    import schemathesis

    engine, _ = scripted_engine(toy, "ok")
    seen = set()
    with serving(engine) as server:
        schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for operation in (result.ok() for result in schema.get_all_operations()):
            seen.add((operation.method.upper(), operation.path))

            def check(case: Any) -> None:
                response = case.call(timeout=PATIENCE)
                assert response.status_code < 500, response.text
                if response.status_code >= 400:
                    assert response.json()["error"]["message"]

            settings = hypothesis.settings(
                max_examples=12,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            settings(hypothesis.given(case=operation.as_strategy())(check))()
        assert server.get("/health").status_code == 200
    assert seen == OPERATIONS


def test_endpoints_that_are_not_there_say_which_are(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "ok")
    with serving(engine) as server:
        response = server.post("/v1/embeddings", {"model": "toy", "input": "Hello"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "route_not_found"
    assert "POST /v1/chat/completions" in response.json()["error"]["message"]
