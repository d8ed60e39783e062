"""What Prometheus is told, by name and by number."""

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsjax.serving import metrics as module
from dsjax.serving.metrics import Metrics, Stopwatch
from tests.serving.scripted import ScriptedEngine


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name and its labels' values but the model's."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m"
            found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_names_are_those_of_vllm():
    metrics = Metrics("m", 1000)
    metrics.watch(ScriptedEngine().stats)
    metrics.count_end("stop")
    names = {name.split()[0] for name in samples(metrics)}
    histograms = {
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
    }
    assert {name for name in names if not name.endswith("_created")} == {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:request_success_total",
        *(f"{name}_{end}" for name in histograms for end in ("bucket", "count", "sum")),
    }


def test_the_times_of_a_request(clock: Clock):
    metrics = Metrics("m", 1000)
    watch = Stopwatch(metrics, prompt_tokens=7, since=99.0)
    clock.now = 101.0
    watch.tokens(1)
    clock.now = 101.5
    watch.tokens(0)
    clock.now = 102.0
    watch.tokens(2)  # half a second each
    watch.end("length")
    found = samples(metrics)
    assert found["vllm:time_to_first_token_seconds_sum"] == 2.0
    assert found["vllm:time_to_first_token_seconds_count"] == 1
    assert found["vllm:inter_token_latency_seconds_sum"] == 1.0
    assert found["vllm:inter_token_latency_seconds_count"] == 2
    assert found["vllm:e2e_request_latency_seconds_sum"] == 3.0
    assert found["vllm:request_prompt_tokens_sum"] == 7
    assert found["vllm:request_generation_tokens_sum"] == 3
    assert found["vllm:request_success_total length"] == 1


def test_the_engine_is_asked_when_prometheus_asks():
    metrics = Metrics("m", 1000)
    engine = ScriptedEngine()
    metrics.watch(engine.stats)
    assert samples(metrics)["vllm:generation_tokens_total"] == 0
    engine.generated = 5
    assert samples(metrics)["vllm:generation_tokens_total"] == 5


def test_two_servers_in_a_process_do_not_mix():
    first, second = Metrics("m", 10), Metrics("m", 10)
    first.count_end("stop")
    assert "vllm:request_success_total stop" not in samples(second)
