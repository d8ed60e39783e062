"""What `/metrics` tells Prometheus, under vLLM's names and in vLLM's buckets.

A dashboard made for vLLM shows this server without a change. What the engine counts itself is read
from its last `EngineStats` when Prometheus asks; what only time tells (how long until the first
token, how long between two) is measured here, request by request, by a `Stopwatch`.

The names are those of https://docs.vllm.ai/en/latest/design/metrics/. Differs from vLLM: tokens
that one step brings together (MTP) share its time equally, where vLLM counts one long wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from dsjax.inference.engine import EngineStats

End = Literal["stop", "length", "abort", "error"]
"""How a request ended: as the engine says it, or `abort`: its client left, `error`: our fault."""

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_NEXT_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_WHOLE_REQUEST = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip

# name, what it says, field of EngineStats
_GAUGES = (
    ("num_requests_running", "Number of requests in execution.", "running"),
    ("num_requests_waiting", "Number of requests waiting to be processed.", "waiting"),
    ("kv_cache_usage_perc", "Cache usage; 1 means that it is full.", "cache_usage"),
)
_COUNTERS = (
    ("prompt_tokens", "Number of prompt tokens processed.", "prompt_tokens"),
    ("generation_tokens", "Number of tokens generated.", "generated_tokens"),
    ("prefix_cache_queries", "Prompt tokens looked up in the cache.", "prefix_queries"),
    ("prefix_cache_hits", "Prompt tokens found in the cache.", "prefix_hits"),
    ("num_preemptions", "Number of requests put back to wait, for want of cache.", "preempted"),
    ("spec_decode_num_draft_tokens", "Number of tokens drafted by MTP.", "drafted"),
    ("spec_decode_num_accepted_tokens", "Number of drafted tokens accepted.", "accepted"),
)


class Metrics:
    """All that is measured, in a registry of its own: two servers in a process do not mix."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, model: str, context: int):
        self.model = model
        self.registry = CollectorRegistry()
        tokens = _round_numbers(context)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token.", _FIRST_TOKEN
        )
        self.next_token = self._histogram(
            "inter_token_latency_seconds", "From one token to the next.", _NEXT_TOKEN
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From a request to its last token.", _WHOLE_REQUEST
        )
        self.prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", tokens)
        self.generation = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", tokens
        )
        self._ended = Counter(
            "vllm:request_success",
            "Number of requests by how they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Also show the engine's own counts, as `stats` says they are."""
        self.registry.register(_EngineCollector(self.model, stats))

    def count_end(self, end: End) -> None:
        """One request more has ended like this."""
        self._ended.labels(self.model, end).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", text, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self.model)


class Stopwatch:
    """The times of one request, from `since` (of `time.monotonic`) on."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, since: float):
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._generated = 0
        self._start = self._last = since

    def tokens(self, n: int) -> None:
        """`n` tokens have come together."""
        if n == 0:
            return
        now = time.monotonic()
        waited, self._last = now - self._last, now
        if self._generated == 0:
            # What came with the first token took no further step.
            self._metrics.first_token.observe(waited)
        else:
            for _ in range(n):
                self._metrics.next_token.observe(waited / n)
        self._generated += n

    def end(self, end: End) -> None:
        """Nothing more will come."""
        self._metrics.count_end(end)
        self._metrics.whole.observe(time.monotonic() - self._start)
        self._metrics.prompt.observe(self._prompt_tokens)
        self._metrics.generation.observe(self._generated)


class _EngineCollector(Collector):
    """Turns `EngineStats` into samples at the moment when they are asked for."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]):
        self._model = model
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for kind, rows in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, field in rows:
                family = kind(f"vllm:{name}", text, labels=["model_name"])
                family.add_metric([self._model], getattr(stats, field))
                yield family


def _round_numbers(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to the largest.

    >>> _round_numbers(60)
    (1, 2, 5, 10, 20, 50)
    """
    numbers = (m * 10**e for e in range(len(str(largest))) for m in (1, 2, 5))
    return tuple(number for number in numbers if number <= largest)
