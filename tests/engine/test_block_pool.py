from __future__ import annotations

import pytest

from rapshee_engine.engine.block_pool import BlockPool


def test_allocated_blocks_are_distinct_and_no_longer_free() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3
    assert pool.num_free == 1
    assert pool.count_free(range(4)) == 1
    pool.check_integrity([blocks])


def test_a_block_is_free_when_its_last_reference_is_dropped() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.acquire([block])
    pool.release(block, keep=False)
    assert pool.num_free == 1
    pool.release(block, keep=False)
    assert pool.num_free == 2


def test_kept_blocks_are_taken_last_and_the_longest_released_of_them_first() -> None:
    pool = BlockPool(4)
    a, b, c, d = pool.allocate(4)
    for block, keep in ((a, True), (b, False), (c, True), (d, False)):
        pool.release(block, keep=keep)
    assert set(pool.allocate(2)) == {b, d}
    assert pool.allocate(2) == [a, c]


def test_a_free_block_can_be_acquired_again() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.release(a, keep=True)
    pool.acquire([a])
    assert pool.num_free == 0
    pool.check_integrity([[a], [b]])


def test_a_block_is_not_released_twice() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.release(block, keep=False)
    with pytest.raises(RuntimeError, match="more often than acquired"):
        pool.release(block, keep=False)


def test_integrity_sees_a_lost_and_a_shared_block() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(RuntimeError, match="reference counts"):
        pool.check_integrity([])
    with pytest.raises(RuntimeError, match="reference counts"):
        pool.check_integrity([blocks, blocks])
