from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapshee_engine.engine.kv_cache import KVCache, KVGroup
from rapshee_engine.engine.request import Request
from rapshee_engine.sampling_params import SamplingParams

BLOCK = 4


def make_cache(*groups: KVGroup, budget: int = 8, caching: bool = True) -> KVCache:
    return KVCache(groups, BLOCK, max_num_batched_tokens=budget, enable_prefix_caching=caching)


def admit(cache: KVCache, tokens: list[int], num_tokens: int | None = None) -> Request:
    """A running request whose next ``num_tokens`` tokens (None: all) are being computed."""
    request = Request("r", tokens, SamplingParams(), max_tokens=4)
    cached = cache.prefix_cache.match(request)
    request.num_collected_tokens = request.num_computed_tokens = len(cached[0]) * BLOCK
    num_tokens = num_tokens or len(tokens) - request.num_computed_tokens
    cache.admit(request, cached, num_tokens)
    request.num_computed_tokens += num_tokens
    return request


def collect(cache: KVCache, request: Request, num_collected_tokens: int) -> None:
    request.num_collected_tokens = num_collected_tokens
    cache.advance(request)
    cache.check_integrity([request], [])


@pytest.mark.parametrize(
    ("collected", "dropped"), [(4, 0), (9, 0), (10, 1), (13, 1), (14, 2), (16, 2)]
)
def test_blocks_that_the_next_token_cannot_see_are_given_back(collected: int, dropped: int) -> None:
    cache = make_cache(KVGroup(8), KVGroup(8, window=7))
    request = admit(cache, list(range(16)))
    before = [list(table) for table in request.block_tables]
    collect(cache, request, collected)
    full, windowed = request.block_tables
    assert full == before[0]
    assert windowed == [-1] * dropped + before[1][dropped:]
    assert [pool.num_free for pool in cache.pools] == [4, 4 + dropped]


def test_a_window_of_one_token_keeps_no_full_block() -> None:
    cache = make_cache(KVGroup(8, window=1))
    request = admit(cache, list(range(8)))
    collect(cache, request, 8)
    assert request.block_tables == [[-1, -1]]
    cache.extend(request, cache.missing_blocks(request, 1))
    assert cache.pools[0].num_free == 7


def test_tokens_in_flight_keep_what_they_see() -> None:
    cache = make_cache(KVGroup(8, window=4))
    request = admit(cache, list(range(16)), num_tokens=8)
    cache.extend(request, cache.missing_blocks(request, 8))
    request.num_computed_tokens = 16
    collect(cache, request, 8)  # the second step computes tokens from 8 on
    assert request.num_dropped_blocks == [1]


def test_the_end_gives_back_what_is_left() -> None:
    cache = make_cache(KVGroup(4), KVGroup(4, window=5))
    request = admit(cache, list(range(16)))
    collect(cache, request, 13)
    assert cache.usage == 1.0
    cache.release(request.block_tables)
    assert cache.usage == 0
    cache.check_integrity([], [])


def test_usage_is_that_of_the_fullest_group() -> None:
    cache = make_cache(KVGroup(8), KVGroup(4, window=5))
    admit(cache, list(range(8)))
    assert cache.usage == 0.5


def test_a_new_request_finds_the_window_of_an_old_one() -> None:
    cache = make_cache(KVGroup(8), KVGroup(8, window=6))
    old = admit(cache, list(range(12)))
    tables = [list(table) for table in old.block_tables]
    collect(cache, old, 12)
    cache.release(old.block_tables)
    new = admit(cache, [*range(12), 50, 51], num_tokens=2)
    assert new.block_tables[0][:3] == tables[0]
    assert new.block_tables[1][:3] == [-1, *tables[1][1:]]
    assert new.num_dropped_blocks == [0, 1]
    cache.check_integrity([new], [])


def test_room_is_what_the_sequence_holds_at_a_time() -> None:
    """64 tokens are 16 blocks, but a window of 9 and steps of 8 tokens touch 5 at most."""
    request = Request("r", list(range(64)), SamplingParams(), max_tokens=4)
    for num_blocks, spare, fits in ((5, 0, True), (4, 0, False), (6, 1, True), (6, 2, False)):
        cache = make_cache(KVGroup(30), KVGroup(num_blocks, window=9))
        assert cache.has_room(request, [[], []], spare) == fits
    assert not make_cache(KVGroup(15), KVGroup(5, window=9)).has_room(request, [[], []], 0)


def test_room_counts_a_free_block_that_was_found_once() -> None:
    cache = make_cache(KVGroup(4))
    old = admit(cache, list(range(12)))
    collect(cache, old, 12)
    cache.release(old.block_tables)
    request = Request("r", [*range(12), 50], SamplingParams(), max_tokens=4)
    cached = cache.prefix_cache.match(request)
    assert len(cached[0]) == 3
    assert cache.has_room(request, cached, spare=0)
    assert not cache.has_room(request, cached, spare=1)


@pytest.mark.parametrize(
    ("groups", "longest"),
    [
        ([KVGroup(10)], 40),
        ([KVGroup(10), KVGroup(5, window=9)], 40),
        ([KVGroup(10), KVGroup(4, window=9)], 16),
        ([KVGroup(5, window=9)], sys.maxsize),
    ],
)
def test_the_longest_sequence(groups: list[KVGroup], longest: int) -> None:
    assert make_cache(*groups).max_sequence_tokens == longest


@settings(deadline=None)
@given(
    window=st.integers(1, 20),
    budget=st.integers(1, 20),
    steps=st.lists(st.integers(1, 20), min_size=1),
)
def test_no_longer_sequence_needs_more_than_the_longest_that_fits(
    window: int, budget: int, steps: list[int]
) -> None:
    """With the blocks that make any length fit, steps of any sizes find theirs."""
    one_more = 1 + -(-(window + budget - 2) // BLOCK)
    cache = make_cache(KVGroup(one_more, window), budget=budget)
    assert cache.max_sequence_tokens == sys.maxsize
    if one_more > 1:
        assert (
            make_cache(KVGroup(one_more - 1, window), budget=budget).max_sequence_tokens
            < sys.maxsize
        )
    request = Request("r", [0], SamplingParams(), max_tokens=4)
    cache.admit(request, [[]], 0)
    for size in steps:
        missing = cache.missing_blocks(request, min(size, budget))
        assert cache.has_free(missing)
        cache.extend(request, missing)
        request.num_computed_tokens += min(size, budget)
        request.token_ids += [0] * min(size, budget)
        collect(cache, request, request.num_computed_tokens)


@settings(deadline=None)
@given(window=st.integers(1, 20), budget=st.integers(1, 20))
def test_one_block_less_can_be_too_few(window: int, budget: int) -> None:
    """A step that begins with the last token of a block takes all the blocks of the bound."""
    most = 1 + -(-(window + budget - 2) // BLOCK)
    cache = make_cache(KVGroup(10 * most, window), budget=budget)
    request = Request("r", [0], SamplingParams(), max_tokens=4)
    cache.admit(request, [[]], 0)
    start = next(s for s in range(window, window + BLOCK) if (s + 1 - window) % BLOCK == BLOCK - 1)
    request.token_ids += [0] * start
    cache.extend(request, cache.missing_blocks(request, start))
    request.num_computed_tokens = start
    collect(cache, request, start)
    cache.extend(request, cache.missing_blocks(request, budget))
    assert 10 * most - cache.pools[0].num_free == most


def test_integrity_sees_a_block_that_was_kept_or_dropped_too_early() -> None:
    cache = make_cache(KVGroup(8, window=4))
    request = admit(cache, list(range(16)))
    request.num_collected_tokens = 12
    with pytest.raises(RuntimeError, match="has dropped 0 blocks of group 0"):
        cache.check_integrity([request], [])
    cache.advance(request)
    request.num_collected_tokens = 0
    with pytest.raises(RuntimeError, match="has dropped 2 blocks"):
        cache.check_integrity([request], [])
