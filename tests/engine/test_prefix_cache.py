from __future__ import annotations

import pytest

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
    one.block_table = blocks
    one.num_collected_tokens = len(tokens)
    return one


@pytest.fixture
def cache() -> PrefixCache:
    cache = PrefixCache(BLOCK)
    cache.insert(computed(list(range(12)), [7, 8, 9]))
    return cache


def test_an_equal_beginning_is_found(cache: PrefixCache) -> None:
    assert cache.match(request([*range(12), 99])) == [7, 8, 9]
    assert cache.match(request([*range(8), 99, 99, 99, 99, 99])) == [7, 8]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12, 13])
def test_at_least_one_token_is_left_to_compute(cache: PrefixCache, length: int) -> None:
    tokens = [*range(12), 99][:length]
    assert len(cache.match(request(tokens))) == (length - 1) // BLOCK


def test_a_difference_hides_everything_behind_it(cache: PrefixCache) -> None:
    assert cache.match(request([0, 1, 2, 99, *range(4, 13)])) == []


def test_the_same_block_of_tokens_elsewhere_is_another(cache: PrefixCache) -> None:
    assert cache.match(request([*range(4, 12), 99])) == []


def test_salts_and_adapters_are_kept_apart(cache: PrefixCache) -> None:
    assert cache.match(request(list(range(13)), salt="tenant")) == []
    assert cache.match(request(list(range(13)), adapter=0)) == []
    cache.insert(computed(list(range(12)), [1, 2, 3], salt="tenant"))
    assert cache.match(request(list(range(13)), salt="tenant")) == [1, 2, 3]
    assert cache.match(request(list(range(13)))) == [7, 8, 9]


def test_only_full_computed_blocks_are_inserted() -> None:
    cache = PrefixCache(BLOCK)
    one = computed(list(range(12)), [7, 8, 9])
    one.num_collected_tokens = 7
    cache.insert(one)
    assert len(cache) == 1
    one.num_collected_tokens = 8
    cache.insert(one)
    assert 8 in cache
    assert 9 not in cache


def test_of_equal_blocks_the_first_is_found(cache: PrefixCache) -> None:
    cache.insert(computed(list(range(12)), [1, 2, 3]))
    assert cache.match(request(list(range(13)))) == [7, 8, 9]
    assert 1 not in cache
    cache.check_integrity()


def test_forgotten_blocks_are_not_found(cache: PrefixCache) -> None:
    cache.forget([8, 5])
    assert cache.match(request(list(range(13)))) == [7]
    cache.check_integrity()


def test_prompt_logprobs_find_nothing_but_can_be_found(cache: PrefixCache) -> None:
    assert cache.match(request(list(range(13)), prompt_logprobs=1)) == []
    cache.insert(computed(list(range(50, 58)), [1, 2], prompt_logprobs=1))
    assert cache.match(request(list(range(50, 59)))) == [1, 2]


def test_a_disabled_cache_holds_nothing() -> None:
    cache = PrefixCache(BLOCK, enabled=False)
    cache.insert(computed(list(range(12)), [7, 8, 9]))
    assert len(cache) == 0
    assert cache.match(request(list(range(13)))) == []


def test_a_salt_may_be_any_string() -> None:
    cache = PrefixCache(BLOCK)
    cache.insert(computed(list(range(4)), [1], salt="\ud800"))
    assert cache.match(request(list(range(5)), salt="\ud800")) == [1]
