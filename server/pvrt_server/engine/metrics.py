"""What the engine counts and times, for Prometheus.

Names, labels and units are vLLM's, so that dashboards and load generators made for it work here
too. Times are in seconds. Requests are counted per sequence: one with n=3 counts as three, as
there.
"""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric

from pvrt_server.engine.sequences import PromptEvent, Sequence, TokenEvent

CONTENT_TYPE = CONTENT_TYPE_LATEST
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_EACH = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 240, 480, 960, 1920)


class Metrics:
    """The counters of one engine; they belong to its worker thread, and may be read from any."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, buckets=buckets, registry=registry)

        self._running = gauge("num_requests_running", "Sequences that run.")
        self._waiting = gauge("num_requests_waiting", "Requests that wait for their turn.")
        self._cache = gauge("kv_cache_usage_perc", "Share of the KV cache in use, 1 for all.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._preemptions = counter("num_preemptions", "Sequences put back for lack of cache.")
        self._prompt = counter("prompt_tokens", "Prompt tokens read.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success", "Finished requests.", ["finished_reason"], registry=registry
        )
        for reason in ("stop", "length"):
            self._success.labels(reason)
        self._prompt_length = histogram("request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self._answer_length = histogram("request_generation_tokens", "Tokens generated.", _TOKENS)
        self._first = histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST)
        self._between = histogram("inter_token_latency_seconds", "Token to token.", _EACH)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", _EACH
        )
        self._whole = histogram("e2e_request_latency_seconds", "Arrival to last token.", _WHOLE)
        self._queued = histogram("request_queue_time_seconds", "Arrival to start.", _WHOLE)
        self._prefill = histogram("request_prefill_time_seconds", "Start to first token.", _WHOLE)
        self._decode = histogram("request_decode_time_seconds", "First to last token.", _WHOLE)

    def expose(self, model_name: str) -> bytes:
        """Everything in Prometheus' text format, labelled with a model's name."""
        return generate_latest(_Labelled(self._registry, model_name))

    def watch(
        self,
        running: Callable[[], float],
        waiting: Callable[[], float],
        cache_share: Callable[[], float],
    ) -> None:
        """Who tells how much is under way; asked whenever the metrics are read, from any thread."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._cache.set_function(cache_share)

    def preempted(self) -> None:
        """A sequence was put back."""
        self._preemptions.inc()

    def admitted(self, sequence: Sequence) -> None:
        """A sequence starts, or starts again."""
        self._queries.inc(len(sequence.request.prompt_ids))
        self._hits.inc(min(sequence.cached, len(sequence.request.prompt_ids)))
        if sequence.times.admit():
            self._queued.observe(sequence.times.queued)

    def observe(self, sequence: Sequence, event: PromptEvent | TokenEvent) -> None:
        """An event of a sequence."""
        times = sequence.times
        if isinstance(event, PromptEvent):
            self._prompt.inc(len(sequence.request.prompt_ids))
            self._prompt_length.observe(len(sequence.request.prompt_ids))
        else:
            self._generated.inc()
            since_last = times.token()
            if since_last is None:
                self._first.observe(times.to_first)
                self._prefill.observe(times.to_first - times.queued)
            else:
                self._between.observe(since_last)
        if event.finish_reason is not None:
            self._success.labels(event.finish_reason).inc()
            self._answer_length.observe(sequence.generated)
            whole = times.whole
            self._whole.observe(whole)
            if sequence.generated:
                self._decode.observe(whole - times.to_first)
            if sequence.generated > 1:
                self._per_token.observe((whole - times.to_first) / (sequence.generated - 1))


class _Labelled:
    """A registry whose samples carry the labels that vLLM's carry."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            if metric.name.startswith("vllm:"):
                samples: list[Any] = metric.samples
                metric.samples = [s._replace(labels={**self._labels, **s.labels}) for s in samples]
            yield metric
