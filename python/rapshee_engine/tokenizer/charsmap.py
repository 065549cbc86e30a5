"""Checks a sentencepiece character map, which the library follows without looking.

The map is a size (u32), a double array of that many bytes, and the texts that characters become,
each ended by a NUL. The array is that of the Darts-clone library: a unit holds the character's
byte, the distance to its children, and whether one of these is a leaf, which holds where the text
begins.
"""

from __future__ import annotations

import numpy as np

__all__ = ["charsmap_error"]

_UNIT_BYTES = 4
_BLOCK_UNITS = 256  # children of one unit lie in one block


def charsmap_error(data: bytes) -> str | None:
    """Why a map must not be used; None if no text can lead out of it."""
    if len(data) < _UNIT_BYTES:
        return "it is truncated"
    size = int.from_bytes(data[:_UNIT_BYTES], "little")
    texts = data[_UNIT_BYTES + size :]
    if not size or size % (_UNIT_BYTES * _BLOCK_UNITS) or size > len(data) - _UNIT_BYTES:
        return f"its array is said to be {size} bytes long, of {len(data) - _UNIT_BYTES}"
    if not texts.endswith(b"\0"):
        return "its last text has no end"
    units = np.frombuffer(data, "<u4", size // _UNIT_BYTES, _UNIT_BYTES)
    nodes = np.flatnonzero(units >> 31 == 0)
    unit = units[nodes].astype(np.int64)
    children = nodes ^ (unit >> 10 << ((unit & 1 << 9) >> 6))
    if (children | _BLOCK_UNITS - 1).max(initial=0) >= len(units):
        return "its array leads out of itself"
    leaves = units[children[unit >> 8 & 1 == 1]] & 0x7FFFFFFF
    if leaves.max(initial=0) >= len(texts):
        return "its array leads out of its texts"
    return None
