"""GET /metrics: what Prometheus reads."""

import threading
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.server.running import Server, scripted_engine, serving


def read(server: Server) -> dict[str, float]:
    """Samples by name and labels other than the model's."""
    response = httpx.get(f"{server.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("vllm:"):
                assert labels.pop("model_name") == "toy"
                assert labels.pop("engine") == "0"
            name = sample.name + "".join(f",{key}={value}" for key, value in labels.items())
            found[name] = sample.value
    return found


def test_requests_tokens_and_times_are_counted(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "hello")
    with serving(engine) as server:
        assert read(server)["vllm:request_success_total,finished_reason=stop"] == 0
        body: dict[str, Any] = {"prompt": "a prompt of 20 bytes", "max_tokens": 99, "n": 2}
        server.post("/v1/completions", body)
        server.post("/v1/completions", {**body, "n": 1, "max_tokens": 3})
        found = read(server)
    assert found["vllm:request_success_total,finished_reason=stop"] == 2
    assert found["vllm:request_success_total,finished_reason=length"] == 1
    assert found["vllm:prompt_tokens_total"] == 60
    assert found["vllm:generation_tokens_total"] == 15
    assert found["vllm:time_to_first_token_seconds_count"] == 3
    assert found["vllm:inter_token_latency_seconds_count"] == 12
    assert found["vllm:request_time_per_output_token_seconds_count"] == 3
    assert found["vllm:e2e_request_latency_seconds_count"] == 3
    assert found["vllm:request_queue_time_seconds_count"] == 3
    assert found["vllm:num_requests_running"] == 0
    assert found["vllm:num_requests_waiting"] == 0
    assert 0 <= found["vllm:kv_cache_usage_perc"] <= 1
    assert found["process_resident_memory_bytes"] > 1e6


def test_what_runs_and_waits_is_seen_while_it_does(toy: Path) -> None:
    engine, _ = scripted_engine(toy, "x" * 2000, max_sequences=1)
    with serving(engine) as server:
        body = {"prompt": "ab", "max_tokens": 400}
        threads = [
            threading.Thread(target=server.post, args=("/v1/completions", body)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        seen = read(server)
        # Both wait for a moment before the first one is taken up.
        while (seen["vllm:num_requests_running"], seen["vllm:num_requests_waiting"]) != (1, 1):
            assert all(thread.is_alive() for thread in threads)
            seen = read(server)
        for thread in threads:
            thread.join(20)


def test_known_beginnings_are_counted(server: Server) -> None:
    before = read(server)
    body = {"prompt": "the same beginning of many words", "max_tokens": 2}
    for _ in range(2):
        server.post("/v1/completions", body)
    found = read(server)
    queries = "vllm:prefix_cache_queries_total"
    assert found[queries] - before[queries] == 64
    hits = "vllm:prefix_cache_hits_total"
    assert found[hits] - before[hits] >= 31
