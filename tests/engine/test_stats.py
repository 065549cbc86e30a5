from __future__ import annotations

import pytest

from rapshee_engine.engine.stats import EngineStats, Histogram


@pytest.mark.parametrize(
    ("value", "bucket"), [(0, 0), (1, 0), (1.5, 1), (2, 1), (4, 2), (4.1, 3), (1e9, 3)]
)
def test_a_value_falls_into_the_first_bucket_that_holds_it(value: float, bucket: int) -> None:
    histogram = Histogram((1, 2, 4))
    histogram.observe(value)
    assert histogram.counts == [int(i == bucket) for i in range(4)]
    assert (histogram.count, histogram.total) == (1, value)
    counts, total = histogram.snapshot()
    histogram.observe(1)
    assert (sum(counts), total) == (1, value)


def test_engines_do_not_share_their_counts() -> None:
    first, second = EngineStats(), EngineStats()
    first.finished["stop"] += 1
    first.time_to_first_token.observe(0.1)
    assert second.finished["stop"] == 0
    assert second.time_to_first_token.count == 0
