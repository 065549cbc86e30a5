"""Which KV blocks a sequence holds, from its admission to its end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapshee_engine.engine.block_pool import BlockPool
from rapshee_engine.engine.prefix_cache import BlockTables, PrefixCache
from rapshee_engine.engine.request import Request

__all__ = ["KVCache", "KVGroup"]


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with one sliding window. They share block tables; a block holds ``block_size`` tokens
    of all of them.

    Attributes:
        num_blocks: physical blocks.
        window: in tokens, the query's own included; 0: everything is seen.
    """

    num_blocks: int
    window: int = 0


class KVCache:
    """The blocks of every group, and what is kept of ended sequences.

    A sequence has a block table for each group; all have the same length. Of a group with a window
    it holds only the blocks that its tokens to come can see. Steps in flight begin where the
    collected tokens end, so they see no more than that.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        block_size: int,
        *,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        self.pools = tuple(BlockPool(group.num_blocks) for group in groups)
        windows = tuple(group.window for group in groups)
        self.prefix_cache = PrefixCache(block_size, windows, enabled=enable_prefix_caching)
        self._most = tuple(self._most_in(window, max_num_batched_tokens) for window in windows)

    @property
    def usage(self) -> float:
        """Share of the blocks that are referenced, in the group that has the fewest left."""
        return max(1.0 - pool.num_free / pool.num_blocks for pool in self.pools)

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence that can run, if it is alone."""
        return min(
            sys.maxsize if pool.num_blocks >= most else pool.num_blocks * self.block_size
            for pool, most in zip(self.pools, self._most, strict=True)
        )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of a group that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    # Admission

    def has_room(self, request: Request, cached: BlockTables, spare: int) -> bool:
        """Whether all that the sequence will hold at a time, of which ``cached`` was found, and
        ``spare`` blocks are free in every group."""
        return all(
            self._will_hold(request, table, most) - _count(table) + spare
            <= pool.num_free - pool.count_free(_held(table))
            for pool, most, table in zip(self.pools, self._most, cached, strict=True)
        )

    def admit(self, request: Request, cached: BlockTables, num_tokens: int) -> None:
        """Give a sequence what was found of it, and blocks for ``num_tokens`` tokens behind."""
        for pool, table in zip(self.pools, cached, strict=True):
            pool.acquire(_held(table))
        request.block_tables = cached
        request.num_dropped_blocks = [len(table) - _count(table) for table in cached]
        request.num_hashed_blocks = len(cached[0])
        self.extend(request, self.blocks_for(num_tokens))

    # Running

    def missing_blocks(self, request: Request, num_tokens: int) -> int:
        """Blocks that the next ``num_tokens`` tokens take beyond those at hand, in each group."""
        wanted = self.blocks_for(request.num_computed_tokens + num_tokens)
        return max(0, wanted - len(request.block_tables[0]))

    def has_free(self, count: int) -> bool:
        """Whether every group has so many free blocks."""
        return all(pool.num_free >= count for pool in self.pools)

    def extend(self, request: Request, count: int) -> None:
        """Give ``count`` blocks of each group; the caller made sure that they are there."""
        for group, table in enumerate(request.block_tables):
            blocks = self.pools[group].allocate(count)
            self.prefix_cache.forget(group, blocks)
            table += blocks

    def advance(self, request: Request) -> None:
        """Take note that a step of the sequence was collected: blocks that it filled can be found
        from now on, and those that no window reaches any more are given back."""
        self.prefix_cache.insert(request)
        for group, table in enumerate(request.block_tables):
            first = self._first_needed(group, request)
            for index in range(request.num_dropped_blocks[group], first):
                self._release_block(group, table[index])
                table[index] = -1
            request.num_dropped_blocks[group] = first

    # The end

    def release(self, tables: BlockTables) -> None:
        """Give the blocks of a sequence back, so that ends are evicted before beginnings."""
        for group, table in enumerate(tables):
            for block in reversed(_held(table)):
                self._release_block(group, block)

    # Self-check

    def check_integrity(self, running: Iterable[Request], late: Iterable[BlockTables]) -> None:
        """Raise RuntimeError unless pools, prefix cache and tables agree; ``late``: tables that
        steps in flight keep from being released."""
        running = list(running)
        all_tables = [*(request.block_tables for request in running), *late]
        for group, pool in enumerate(self.pools):
            pool.check_integrity([_held(tables[group]) for tables in all_tables])
        self.prefix_cache.check_integrity()
        for request in running:
            self._check_tables(request)

    def _check_tables(self, request: Request) -> None:
        name, tables = request.request_id, request.block_tables
        if any(len(table) < self.blocks_for(request.num_computed_tokens) for table in tables):
            raise RuntimeError(f"{name} lacks blocks")
        for group, table in enumerate(tables):
            dropped = request.num_dropped_blocks[group]
            if dropped != self._first_needed(group, request):
                raise RuntimeError(f"{name} has dropped {dropped} blocks of group {group}")
            if len(table) != len(tables[0]) or len(table) - _count(table) != dropped:
                raise RuntimeError(f"{name} has a wrong table of group {group}: {table}")

    # Sizes

    def _most_in(self, window: int, max_num_batched_tokens: int) -> int:
        """Blocks of a group that a sequence needs at most to go on while no step of it is in
        flight, whatever its length: the window before a step and the step's tokens,
        window - 1 + max_num_batched_tokens of them in a row, may begin with the last of a block."""
        if not window:
            return sys.maxsize
        return 1 + self.blocks_for(window + max_num_batched_tokens - 2)

    def _will_hold(self, request: Request, cached: Sequence[int], most: int) -> int:
        dropped = len(cached) - _count(cached)
        return min(self.blocks_for(request.num_tokens) - dropped, most)

    def _first_needed(self, group: int, request: Request) -> int:
        return self.prefix_cache.first_seen(group, request.num_collected_tokens)

    def _release_block(self, group: int, block: int) -> None:
        self.pools[group].release(block, keep=self.prefix_cache.holds(group, block))


def _held(table: Sequence[int]) -> Sequence[int]:
    """The blocks of a table without those that were dropped, which come first."""
    return table[len(table) - _count(table) :]


def _count(table: Sequence[int]) -> int:
    return len(table) - table.count(-1)
