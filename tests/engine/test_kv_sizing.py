from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.kv_cache import KVGroup
from rapshee_engine.engine.kv_sizing import share_memory, wanted_blocks
from rapshee_engine.engine.request import Request
from rapshee_engine.engine.scheduler import Scheduler
from rapshee_engine.sampling_params import SamplingParams

BLOCK = 16


def wanted(window: int, max_model_len: int = 32768, **options: Any) -> int:
    config = EngineConfig(model="m", **options)
    return wanted_blocks(config, window, max_model_len=max_model_len, block_size=BLOCK)


def test_without_a_window_all_contexts_fit() -> None:
    assert wanted(0) == 64 * 32768 // BLOCK
    assert wanted(0, max_model_len=100, max_num_seqs=8) == 8 * 7


def test_a_window_wants_far_less() -> None:
    # 32 blocks of the window and 3 more, and those of two steps.
    assert wanted(512, enable_prefix_caching=False) == 64 * 35 + 64
    assert wanted(512) == 2 * (64 * 35 + 64)
    assert wanted(513, enable_prefix_caching=False) == wanted(512, enable_prefix_caching=False)
    assert wanted(514, enable_prefix_caching=False) == 64 * 36 + 64


def test_a_window_never_wants_more_than_contexts() -> None:
    assert wanted(4096, max_model_len=100) == wanted(0, max_model_len=100)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize(("window", "budget"), [(1, 40), (17, 40), (40, 30), (5, 100)])
def test_a_window_with_what_it_wants_never_runs_short(
    window: int, budget: int, steps_in_flight: int
) -> None:
    """Eight long sequences at once, of which each step computes as much as it may."""
    options: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": budget}
    num_blocks = wanted(window, enable_prefix_caching=False, **options)
    scheduler = Scheduler(
        kv_groups=[KVGroup(num_blocks, window)],
        block_size=BLOCK,
        enable_prefix_caching=False,
        **options,
    )
    for i in range(8):
        prompt = [i] * (90 + 37 * i)
        scheduler.add(Request(str(i), prompt, SamplingParams(), max_tokens=60))
    in_flight = []
    most_running = 0
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        if step is not None:
            in_flight.append(step)
        most_running = max(most_running, len(scheduler.running))
        if step is None or len(in_flight) == steps_in_flight:
            step = in_flight.pop(0)
            scheduler.update(step, [7 if s.samples else None for s in step.sequences])
        scheduler.check_integrity()
    assert scheduler.num_preemptions == 0
    assert most_running == 8


def test_memory_is_shared_equally_up_to_what_is_wanted() -> None:
    assert share_memory(1000, [10], [500]) == [100]
    assert share_memory(1000, [10], [50]) == [50]
    # 3 layers without and 15 with a window: 18 bytes for a block of each.
    assert share_memory(1800, [3, 15], [1000, 1000]) == [100, 100]
    assert share_memory(1800, [3, 15], [1000, 50]) == [350, 50]
    assert share_memory(1800, [15, 3], [50, 1000]) == [50, 350]
    assert min(share_memory(17, [3, 15], [9, 9])) == 0
    assert share_memory(10**9, [3, 15], [1000, 50]) == [1000, 50]


@given(
    memory=st.integers(0, 10_000),
    groups=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 200)), min_size=1, max_size=4),
)
def test_memory_is_used_but_not_exceeded(memory: int, groups: list[tuple[int, int]]) -> None:
    block_bytes, wants = [list(column) for column in zip(*groups, strict=True)]
    shares = share_memory(memory, block_bytes, wants)
    used = sum(n * b for n, b in zip(shares, block_bytes, strict=True))
    assert used <= memory
    assert all(0 <= share <= want for share, want in zip(shares, wants, strict=True))
    for share, want in zip(shares, wants, strict=True):
        if share < want:  # as much as this and one more does not fit for all
            more = [min(other, share + 1) for other in wants]
            assert sum(n * b for n, b in zip(more, block_bytes, strict=True)) > memory
