"""Physical KV blocks: reference counts and the order in which free ones are taken."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["BlockPool"]


class BlockPool:
    """Block ids ``0 .. num_blocks - 1``, each free or referenced. All operations are O(1) a block.

    A free block may still hold keys and values worth finding again (`PrefixCache`). Blocks are
    taken from the front of the free list: first those that hold nothing, then the least recently
    released.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` are free."""
        return sum(1 for block in blocks if not self._ref_counts[block])

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks, each referenced once; the caller made sure they are there."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of ``blocks``, free or not."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._free[block]
            self._ref_counts[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """Drop a reference. A block that becomes free is taken last (``keep``) or first."""
        count = self._ref_counts[block] - 1
        if count < 0:
            raise RuntimeError(f"block {block} was released more often than acquired")
        self._ref_counts[block] = count
        if not count:
            self._free[block] = None
            if not keep:
                self._free.move_to_end(block, last=False)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless reference counts equal the uses in ``tables`` and exactly the
        unreferenced blocks are free."""
        uses = [0] * self.num_blocks
        for table in tables:
            for block in table:
                uses[block] += 1
        if uses != self._ref_counts:
            wrong = [b for b, count in enumerate(uses) if count != self._ref_counts[b]]
            raise RuntimeError(f"reference counts of blocks {wrong} differ from their uses")
        if set(self._free) != {b for b, count in enumerate(uses) if not count}:
            raise RuntimeError("the free list does not hold exactly the unreferenced blocks")
