"""Prometheus metrics of a server. Names behind the prefix are vLLM's, so that with ``--metrics-prefix vllm`` its dashboards
carry over.

Counters and histograms are fed where things happen (``Metrics``' methods); gauges are read from the engine when they are asked
for.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from zoo.serving.host import EngineLoad

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """One registry for one server. ``load`` is called at each scrape."""

    def __init__(self, model: str, load: Callable[[], EngineLoad], prefix: str = "zoo") -> None:
        self._registry, self._load = CollectorRegistry(), load
        self._seen = EngineLoad()
        names = ("model_name",)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"{prefix}:{name}", text, names, registry=self._registry).labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"{prefix}:{name}", text, names, registry=self._registry).labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{prefix}:{name}", text, names, buckets=buckets, registry=self._registry).labels(model)

        self._running = gauge("num_requests_running", "Sequences that the engine computes.")
        self._waiting = gauge("num_requests_waiting", "Requests that wait, in the engine and before it.")
        self._usage = gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.")
        self._preemptions = counter("num_preemptions", "Sequences that gave their blocks back and started over.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._prompt = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        finished = Counter(
            f"{prefix}:request_success", "Finished requests by their end.", (*names, "finished_reason"), registry=self._registry
        )
        self._finished, self._model = finished, model
        self._first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST)
        self._between = histogram("inter_token_latency_seconds", "From one token of a request to its next.", BETWEEN)
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", WHOLE)
        self._prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTHS)
        self._length = histogram("request_generation_tokens", "Tokens generated for a request.", LENGTHS)

    def tokens(self, count: int, first: bool, seconds: float) -> None:
        """A request got ``count`` tokens, ``seconds`` after its arrival (its first) or after its last ones."""
        self._generated.inc(count)
        if first:
            self._first.observe(seconds)
            return
        for _ in range(count):
            self._between.observe(seconds / count)

    def end(self, reason: str, prompt: int, generated: int, seconds: float) -> None:
        """A request ended, ``seconds`` after its arrival. ``reason``: stop, length, abort or error."""
        self._finished.labels(self._model, reason).inc()
        self._prompt.inc(prompt)
        self._prompt_length.observe(prompt)
        self._length.observe(generated)
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """The exposition, with the gauges as they are now."""
        load, seen = self._load(), self._seen
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._usage.set(load.cache_usage)
        for counter, now, before in (
            (self._preemptions, load.preemptions, seen.preemptions),
            (self._queries, load.prefix_queries, seen.prefix_queries),
            (self._hits, load.prefix_hits, seen.prefix_hits),
        ):
            counter.inc(now - before if now >= before else now)  # an engine that was opened again counts from 0
        self._seen = load
        exposition: bytes = generate_latest(self._registry)
        return exposition
