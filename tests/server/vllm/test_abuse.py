"""The real vLLM server under hostile requests: no 5xx, nothing without end, nobody let down."""

from collections.abc import Iterator

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from pvrt_server.self_test import Target
from tests.server import abuse
from tests.server.made_up import try_operations
from tests.server.running import PATIENCE

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.hostile]
#: Those that clients know; vLLM has more, for its own tools.
OPERATIONS = {
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{response_id}"),
    ("GET", "/v1/models"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/health"),
}


@pytest.fixture(scope="module")
def client(vllm_server: Target) -> Iterator[httpx.Client]:
    """With the key."""
    key = {"Authorization": f"Bearer {vllm_server.api_key}"}
    with httpx.Client(base_url=vllm_server.url, headers=key, timeout=5 * PATIENCE) as client:
        yield client
        assert client.post(abuse.COMPLETIONS, json={"prompt": "a"}).status_code == 200  # it lives


def cpu_seconds() -> float:
    """Of this process' children, all of which belong to the server."""
    family = psutil.Process().children(recursive=True)
    return float(sum(sum(member.cpu_times()[:4]) for member in family))


@pytest.mark.parametrize("name", abuse.everything())
def test_hostile_requests_are_answered_or_refused_at_once(client: httpx.Client, name: str) -> None:
    path, body = abuse.everything()[name]
    before = cpu_seconds()
    answer = client.post(path, json=body)
    assert answer.status_code < 500, answer.text[:300]
    assert cpu_seconds() - before < abuse.CPU_SECONDS


@pytest.mark.parametrize("name", abuse.TRICKS)
def test_connections_that_ask_for_much_are_survived(
    client: httpx.Client, vllm_server: Target, name: str
) -> None:
    abuse.TRICKS[name][0](vllm_server.url)
    assert client.get("/health").status_code == 200


def test_made_up_requests_never_break_the_server(client: httpx.Client, vllm_server: Target) -> None:
    key = dict(client.headers)
    seen = try_operations(vllm_server.url, OPERATIONS, 8, {"Authorization": key["authorization"]})
    assert seen >= OPERATIONS
    assert client.get("/health").status_code == 200
