"""Which block holds the keys and values of which beginning of a sequence."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

from rapshee_engine.engine.request import Request

__all__ = ["PrefixCache"]

_DIGEST_SIZE = 16


class PrefixCache:
    """Full blocks by the digest of everything up to their end.

    A block's digest is BLAKE2b-128 over its parent's digest and its token ids; the first parent
    stands for salt and adapter. So equal digests mean equal tokens at equal positions, for the
    same tenant and adapter. Which unreferenced blocks stay is decided by the free list of the
    `BlockPool`; when it hands a block out again, `forget` drops what was known of it.
    """

    def __init__(self, block_size: int, *, enabled: bool = True) -> None:
        self.block_size = block_size
        self.enabled = enabled
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    def __len__(self) -> int:
        return len(self._digest_of)

    def match(self, request: Request) -> list[int]:
        """Blocks of the longest cached beginning, which leaves at least one token to compute.
        Nothing for a request that wants every prompt row computed."""
        blocks: list[int] = []
        if not (self.enabled and request.use_prefix_cache):
            return blocks
        for index in range((len(request.token_ids) - 1) // self.block_size):
            block = self._block_of.get(self._digest(request, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, request: Request) -> None:
        """Make the full blocks findable that collected steps have written. The first of several
        blocks with equal content stays the one that is found."""
        num_full = request.num_collected_tokens // self.block_size
        if num_full == request.num_hashed_blocks:
            return
        if self.enabled:
            for index in range(request.num_hashed_blocks, num_full):
                digest, block = self._digest(request, index), request.block_table[index]
                if digest not in self._block_of:
                    self._block_of[digest] = block
                    self._digest_of[block] = digest
        request.num_hashed_blocks = num_full

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop ``blocks``, which are about to be written anew."""
        for block in blocks:
            digest = self._digest_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]

    def check_integrity(self) -> None:
        """Raise RuntimeError unless digests and blocks map one to one."""
        if {block: digest for digest, block in self._block_of.items()} != self._digest_of:
            raise RuntimeError("the prefix cache's two maps disagree")

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
