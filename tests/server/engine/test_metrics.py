"""GET /metrics: what Prometheus reads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.server.running import Server, scripted_engine, serving, wait_until


def read(server: Server) -> dict[str, float]:
    """Samples by name and labels other than the model's."""
    response = server.get("/metrics")
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
    engine, model = scripted_engine(toy, "abc", max_sequences=1)
    model.gate.clear()
    with serving(engine) as server, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.post, "/v1/completions", {"prompt": "ab"}) for _ in range(2)]
        wait_until(lambda: engine.running == 1 and engine.waiting == 1)
        # The model is still in its first call: no step has ended that could have told of it.
        during = read(server)
        model.hold_after = 1
        model.gate.set()
        wait_until(lambda: not model.gate.is_set())
        reading = read(server)
        model.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        after = read(server)
    names = [f"vllm:num_requests_{what}" for what in ("running", "waiting")]
    assert [during[name] for name in names] == [1, 1]
    assert [after[name] for name in names] == [0, 0]
    cache = "vllm:kv_cache_usage_perc"
    assert during[cache] == 0
    assert reading[cache] == 3 / (1 << 20)  # two tokens of the prompt, one of the answer


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
