"""What the engines count, in the text format of Prometheus. Names are vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from rapshee_engine.engine.stats import EngineStats, Histogram
from rapshee_engine.server.registry import EngineRegistry

__all__ = ["metrics_registry"]

_LABEL = "model_name"


@dataclass(frozen=True, slots=True)
class _Series:
    """A metric: its name without prefix, its help, and the field of `EngineStats` it shows."""

    name: str
    help: str
    field: str


_GAUGES = (
    _Series("num_requests_running", "Completions that run.", "num_running"),
    _Series("num_requests_waiting", "Completions that wait.", "num_waiting"),
    _Series("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", "kv_cache_usage"),
)
_COUNTERS = (
    _Series("prompt_tokens", "Prompt tokens computed or found in the cache.", "prompt_tokens"),
    _Series("generation_tokens", "Tokens generated.", "generation_tokens"),
    _Series(
        "prefix_cache_queries",
        "Prompt tokens that were looked for in the prefix cache.",
        "prefix_cache_queries",
    ),
    _Series("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_cache_hits"),
    _Series("num_preemptions", "Completions that lost their KV blocks.", "num_preemptions"),
)
_HISTOGRAMS = (
    _Series(
        "time_to_first_token_seconds",
        "From a request's arrival to its first token.",
        "time_to_first_token",
    ),
    _Series(
        "inter_token_latency_seconds",
        "From one token of a completion to the next.",
        "inter_token_latency",
    ),
    _Series(
        "e2e_request_latency_seconds",
        "From a request's arrival to the end of a completion.",
        "request_latency",
    ),
    _Series(
        "request_queue_time_seconds",
        "From a request's arrival to the start of a completion.",
        "queue_time",
    ),
    _Series("request_prompt_tokens", "Prompt tokens a completion.", "request_prompt_tokens"),
    _Series(
        "request_generation_tokens", "Tokens generated a completion.", "request_generation_tokens"
    ),
)


def metrics_registry(registry: EngineRegistry) -> CollectorRegistry:
    """A registry that reads the engines' numbers whenever it is asked, and those of the process. An
    engine with several names is shown once, under the first of them."""
    metrics = CollectorRegistry(auto_describe=False)
    metrics.register(_EngineCollector(registry))
    ProcessCollector(registry=metrics)
    return metrics


class _EngineCollector(Collector):
    """Reads what the engines' threads write: no work is done for it in a step."""

    def __init__(self, registry: EngineRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        engines = [(name, engine.stats) for name, engine in self._registry.engines()]
        for series in _GAUGES:
            yield _filled(GaugeMetricFamily(*_head(series)), series, engines)
        for series in _COUNTERS:
            yield _filled(CounterMetricFamily(*_head(series)), series, engines)
        for series in _HISTOGRAMS:
            yield _histogram(series, engines)
        yield _finished(engines)


Engines = Iterable[tuple[str, EngineStats]]


def _head(series: _Series) -> tuple[str, str, None, list[str]]:
    return f"vllm:{series.name}", series.help, None, [_LABEL]


def _filled(family: Any, series: _Series, engines: Engines) -> Metric:
    for name, stats in engines:
        family.add_metric([name], getattr(stats, series.field))
    metric: Metric = family
    return metric


def _histogram(series: _Series, engines: Engines) -> Metric:
    family = HistogramMetricFamily(f"vllm:{series.name}", series.help, labels=[_LABEL])
    for name, stats in engines:
        histogram: Histogram = getattr(stats, series.field)
        counts, total = histogram.snapshot()
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        at_most = [sum(counts[: index + 1]) for index in range(len(counts))]
        family.add_metric([name], list(zip(bounds, at_most, strict=True)), total)
    return family


def _finished(engines: Engines) -> Metric:
    family = CounterMetricFamily(
        "vllm:request_success",
        "Completions that ended, by reason.",
        labels=[_LABEL, "finished_reason"],
    )
    for name, stats in engines:
        for reason, count in stats.finished.items():
            family.add_metric([name, reason], count)
    return family
