"""What the engine counts. Plain numbers: whoever exposes them chooses the format."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

__all__ = ["EngineStats", "Histogram"]

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0, 1800.0),
)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Histogram:
    """Counts of values by bucket.

    Attributes:
        bounds: upper bounds of the buckets, inclusive; values above go to one more bucket.
        counts: values in each bucket, ``len(bounds) + 1`` of them.
        total: sum of all values.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def snapshot(self) -> tuple[list[int], float]:
        """``counts`` and ``total`` as they stand; any thread may ask."""
        return self.counts.copy(), self.total

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def _seconds() -> Histogram:
    return Histogram(_SECONDS)


def _tokens() -> Histogram:
    return Histogram(_TOKENS)


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made, histograms, and the state after the last step.

    The engine's thread writes; any thread may read, each number being right by itself.

    Attributes:
        num_steps: steps launched.
        prompt_tokens: tokens of prompts that were computed or found in the prefix cache, once a
            request: what its usage says.
        generation_tokens: tokens generated, of all completions.
        prefix_cache_queries, prefix_cache_hits: prompt tokens that were looked for in the prefix
            cache when a completion was first admitted, and those of them that were found.
        num_preemptions: completions that lost their blocks.
        finished: completions by finish reason (``stop``, ``length``, ``abort``, ``error``).
        time_to_first_token, inter_token_latency, queue_time, request_latency: seconds.
        request_prompt_tokens, request_generation_tokens: tokens a finished completion.
        num_running, num_waiting: sequences now.
        kv_cache_usage: share of the KV blocks that are referenced, 0 to 1; of a model with several
            groups of layers (`KVGroup`), in the group that has the fewest left.
    """

    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    finished: dict[str, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0}
    )
    time_to_first_token: Histogram = field(default_factory=_seconds)
    inter_token_latency: Histogram = field(default_factory=_seconds)
    queue_time: Histogram = field(default_factory=_seconds)
    request_latency: Histogram = field(default_factory=_seconds)
    request_prompt_tokens: Histogram = field(default_factory=_tokens)
    request_generation_tokens: Histogram = field(default_factory=_tokens)
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
