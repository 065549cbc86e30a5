"""Which block holds the keys and values of which beginning of a sequence."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TypeAlias

from rapshee_engine.engine.request import Request

__all__ = ["BlockTables", "PrefixCache"]

_DIGEST_SIZE = 16

BlockTables: TypeAlias = "list[list[int]]"
"""For each group of layers the physical blocks of a sequence, -1 for those before its window."""


class PrefixCache:
    """Full blocks by the digest of everything up to their end, in each group of layers.

    A block's digest is BLAKE2b-128 over its parent's digest and its token ids; the first parent
    stands for salt and adapter. So equal digests mean equal tokens at equal positions, for the
    same tenant and adapter. Which unreferenced blocks stay is decided by the free list of the
    group's `BlockPool`; when it hands a block out again, `forget` drops what was known of it.
    """

    def __init__(
        self, block_size: int, windows: Sequence[int] = (0,), *, enabled: bool = True
    ) -> None:
        """``windows``: of each group, in tokens, the query's own included; 0: all is seen."""
        self.block_size = block_size
        self.enabled = enabled
        self._windows = tuple(windows)
        self._block_of: tuple[dict[bytes, int], ...] = tuple({} for _ in windows)
        self._digest_of: tuple[dict[int, bytes], ...] = tuple({} for _ in windows)

    def __len__(self) -> int:
        return sum(map(len, self._digest_of))

    def holds(self, group: int, block: int) -> bool:
        return block in self._digest_of[group]

    def first_seen(self, group: int, position: int) -> int:
        """The first logical block that a query at ``position`` sees."""
        window = self._windows[group]
        return max(0, position + 1 - window) // self.block_size if window else 0

    def match(self, request: Request) -> BlockTables:
        """Blocks of the longest cached beginning, which leaves at least one token to compute:
        those that the tokens after it see. Nothing for a request that wants every prompt row
        computed."""
        count = 0
        if self.enabled and request.use_prefix_cache:
            count = self._longest(request, (len(request.token_ids) - 1) // self.block_size)
        return [
            [-1 if i < first else blocks[self._digest(request, i)] for i in range(count)]
            for first, blocks in zip(self._first_blocks(count), self._block_of, strict=True)
        ]

    def insert(self, request: Request) -> None:
        """Make the full blocks findable that collected steps have written. The first of several
        blocks with equal content stays the one that is found."""
        num_full = request.num_collected_tokens // self.block_size
        if num_full == request.num_hashed_blocks:
            return
        if self.enabled:
            for index in range(request.num_hashed_blocks, num_full):
                digest = self._digest(request, index)
                for group, table in enumerate(request.block_tables):
                    if digest not in self._block_of[group]:
                        self._block_of[group][digest] = table[index]
                        self._digest_of[group][table[index]] = digest
        request.num_hashed_blocks = num_full

    def forget(self, group: int, blocks: Iterable[int]) -> None:
        """Drop ``blocks`` of a group, which are about to be written anew."""
        for block in blocks:
            digest = self._digest_of[group].pop(block, None)
            if digest is not None:
                del self._block_of[group][digest]

    def check_integrity(self) -> None:
        """Raise RuntimeError unless digests and blocks map one to one."""
        for block_of, digest_of in zip(self._block_of, self._digest_of, strict=True):
            if {block: digest for digest, block in block_of.items()} != digest_of:
                raise RuntimeError("the prefix cache's two maps disagree")

    def _first_blocks(self, count: int) -> list[int]:
        """Of each group, the first block that the token behind ``count`` blocks sees."""
        position = count * self.block_size
        return [self.first_seen(group, position) for group in range(len(self._windows))]

    def _longest(self, request: Request, count: int) -> int:
        """Length in blocks of the longest beginning, up to ``count``, that can be continued."""
        for window, blocks in zip(self._windows, self._block_of, strict=True):
            if not window:  # from the start on without a gap
                gaps = (i for i in range(count) if self._digest(request, i) not in blocks)
                count = next(gaps, count)
        # A window has to be without a gap, so what ends behind one is no use.
        while (gap := self._last_gap(request, count)) is not None:
            count = gap
        return count

    def _last_gap(self, request: Request, count: int) -> int | None:
        """The last block before ``count`` which a window there reaches and which is not cached."""
        windowed = [
            (first, blocks)
            for window, first, blocks in zip(
                self._windows, self._first_blocks(count), self._block_of, strict=True
            )
            if window
        ]
        lowest = min((first for first, _ in windowed), default=count)
        for index in range(count - 1, lowest - 1, -1):
            digest = self._digest(request, index)
            if any(first <= index and digest not in blocks for first, blocks in windowed):
                return index
        return None

    def _digest(self, request: Request, index: int) -> bytes:
        """Digest of full block ``index``; computed once a request, in order."""
        digests = request.block_digests
        while len(digests) <= index:
            start = len(digests) * self.block_size
            tokens = array("i", request.token_ids[start : start + self.block_size])
            parent = digests[-1] if digests else _root(request.cache_salt, request.adapter)
            digests.append(blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_SIZE).digest())
        return digests[index]


def _root(salt: str, adapter: int) -> bytes:
    """What the first block's digest chains to: all that tells equal tokens apart."""
    data = adapter.to_bytes(8, "little", signed=True) + salt.encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=_DIGEST_SIZE, person=b"root").digest()
