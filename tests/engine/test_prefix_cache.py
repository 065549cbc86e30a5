from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapshee_engine.engine.prefix_cache import PrefixCache
from rapshee_engine.engine.request import Request
from rapshee_engine.sampling_params import SamplingParams

BLOCK = 4


def request(tokens: list[int], *, salt: str = "", adapter: int = -1, **params: int) -> Request:
    return Request(
        "r", tokens, SamplingParams(**params), max_tokens=4, cache_salt=salt, adapter=adapter
    )


def computed(tokens: list[int], blocks: list[int], **options: object) -> Request:
    """A request all of whose tokens are computed into ``blocks``."""
    one = request(tokens, **options)  # type: ignore[arg-type]
    one.block_tables = [blocks]
    one.num_collected_tokens = len(tokens)
    return one


@pytest.fixture
def cache() -> PrefixCache:
    cache = PrefixCache(BLOCK)
    cache.insert(computed(list(range(12)), [7, 8, 9]))
    return cache


def test_an_equal_beginning_is_found(cache: PrefixCache) -> None:
    assert cache.match(request([*range(12), 99])) == [[7, 8, 9]]
    assert cache.match(request([*range(8), 99, 99, 99, 99, 99])) == [[7, 8]]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12, 13])
def test_at_least_one_token_is_left_to_compute(cache: PrefixCache, length: int) -> None:
    tokens = [*range(12), 99][:length]
    assert len(cache.match(request(tokens))[0]) == (length - 1) // BLOCK


def test_a_difference_hides_everything_behind_it(cache: PrefixCache) -> None:
    assert cache.match(request([0, 1, 2, 99, *range(4, 13)])) == [[]]


def test_the_same_block_of_tokens_elsewhere_is_another(cache: PrefixCache) -> None:
    assert cache.match(request([*range(4, 12), 99])) == [[]]


def test_salts_and_adapters_are_kept_apart(cache: PrefixCache) -> None:
    assert cache.match(request(list(range(13)), salt="tenant")) == [[]]
    assert cache.match(request(list(range(13)), adapter=0)) == [[]]
    cache.insert(computed(list(range(12)), [1, 2, 3], salt="tenant"))
    assert cache.match(request(list(range(13)), salt="tenant")) == [[1, 2, 3]]
    assert cache.match(request(list(range(13)))) == [[7, 8, 9]]


def test_only_full_computed_blocks_are_inserted() -> None:
    cache = PrefixCache(BLOCK)
    one = computed(list(range(12)), [7, 8, 9])
    one.num_collected_tokens = 7
    cache.insert(one)
    assert len(cache) == 1
    one.num_collected_tokens = 8
    cache.insert(one)
    assert cache.holds(0, 8)
    assert not cache.holds(0, 9)


def test_of_equal_blocks_the_first_is_found(cache: PrefixCache) -> None:
    cache.insert(computed(list(range(12)), [1, 2, 3]))
    assert cache.match(request(list(range(13)))) == [[7, 8, 9]]
    assert not cache.holds(0, 1)
    cache.check_integrity()


def test_forgotten_blocks_are_not_found(cache: PrefixCache) -> None:
    cache.forget(0, [8, 5])
    assert cache.match(request(list(range(13)))) == [[7]]
    cache.check_integrity()


def test_prompt_logprobs_find_nothing_but_can_be_found(cache: PrefixCache) -> None:
    assert cache.match(request(list(range(13)), prompt_logprobs=1)) == [[]]
    cache.insert(computed(list(range(50, 58)), [1, 2], prompt_logprobs=1))
    assert cache.match(request(list(range(50, 59)))) == [[1, 2]]


# Windows


def windowed(tables: list[list[int]], windows: Sequence[int]) -> PrefixCache:
    """A cache that knows 20 tokens, in five blocks of each group; -1: not any more."""
    cache = PrefixCache(BLOCK, windows)
    one = computed(list(range(20)), [])
    one.block_tables = [[100 + i for i in range(5)] for _ in tables]
    cache.insert(one)
    for group, table in enumerate(tables):
        cache.forget(group, [100 + i for i, block in enumerate(table) if block < 0])
    return cache


X = -1  # a block that is not cached


@pytest.mark.parametrize(
    ("windows", "cached", "found"),
    [
        # All blocks of a group that sees everything, of a window those that the next token sees.
        ((0, 5), [[0, 1, 2, 3, 4], [X, X, X, X, 4]], [[0, 1, 2, 3, 4], [X, X, X, X, 4]]),
        ((0, 5), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4], [X, X, X, X, 4]]),
        ((0, 6), [[0, 1, 2, 3, 4], [0, 1, 2, X, 4]], [[0, 1, 2], [X, 1, 2]]),
        ((0, 6), [[0, 1, 2, 3, 4], [X, X, X, 3, 4]], [[0, 1, 2, 3, 4], [X, X, X, 3, 4]]),
        ((0, 6), [[0, 1, 2, 3, X], [X, X, 2, 3, 4]], [[0, 1, 2, 3], [X, X, 2, 3]]),
        ((0, 6), [[0, 1, X, 3, 4], [X, X, X, 3, 4]], [[], []]),
        ((0, 6), [[X, 1, 2, 3, 4], [0, 1, 2, 3, 4]], [[], []]),
        # The beginning is whole where the window reaches it.
        ((6, 0), [[0, X, X, X, X], [0, 1, 2, 3, 4]], [[0], [0]]),
        ((8,), [[X, X, X, 3, 4]], [[X, X, X, 3, 4]]),
        ((10,), [[0, 1, X, 3, 4]], [[0, 1]]),
        ((1,), [[X, X, X, X, X]], [[X, X, X, X, X]]),
        # Two windows agree on an end.
        ((5, 9), [[X, X, 2, X, 4], [X, 1, 2, 3, X]], [[X, X, 2], [X, 1, 2]]),
        ((5, 10), [[0, X, 2, X, 4], [0, X, X, 3, 4]], [[0], [0]]),
    ],
)
def test_a_window_needs_only_what_it_sees(
    windows: Sequence[int], cached: list[list[int]], found: list[list[int]]
) -> None:
    expected = [[block if block < 0 else 100 + block for block in table] for table in found]
    assert windowed(cached, windows).match(request(list(range(21)))) == expected


@given(
    windows=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    data=st.data(),
)
def test_the_longest_beginning_is_found(windows: list[int], data: st.DataObject) -> None:
    known = [data.draw(st.lists(st.booleans(), min_size=5, max_size=5)) for _ in windows]
    cache = windowed([[0 if k else X for k in row] for row in known], windows)

    def fits(count: int) -> bool:
        return all(
            all(row[cache.first_seen(group, count * BLOCK) : count])
            for group, row in enumerate(known)
        )

    length = len(cache.match(request(list(range(21))))[0])
    assert length == max(count for count in range(6) if fits(count))


def test_a_disabled_cache_holds_nothing() -> None:
    cache = PrefixCache(BLOCK, enabled=False)
    cache.insert(computed(list(range(12)), [7, 8, 9]))
    assert len(cache) == 0
    assert cache.match(request(list(range(13)))) == [[]]


def test_a_salt_may_be_any_string() -> None:
    cache = PrefixCache(BLOCK)
    cache.insert(computed(list(range(4)), [1], salt="\ud800"))
    assert cache.match(request(list(range(5)), salt="\ud800")) == [[1]]
