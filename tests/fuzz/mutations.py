"""Valid bytes, broken in a few places."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

__all__ = ["mutations"]

# Values at which sums, products, signs and comparisons of 32 and 64 bits turn over.
_EDGES = sorted(
    {
        (base + offset) % (1 << 64)
        for base in (0, 1 << 8, 1 << 16, 1 << 31, 1 << 32, 1 << 61, 1 << 63)
        for offset in (-32, -1, 0, 1, 32)
    }
)


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    """Up to four edits: bytes replaced, an integer set to an edge, a part moved, copied or cut."""
    place = st.integers(0, len(data))
    edits = st.one_of(
        st.tuples(st.just("replace"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("edge"), place, st.sampled_from(_EDGES), st.sampled_from((1, 2, 4, 8))),
        st.tuples(st.just("splice"), place, place, place),
        st.tuples(st.just("truncate"), place),
    )
    return st.lists(edits, min_size=1, max_size=4).map(lambda list_: _apply(data, list_))


def _apply(data: bytes, edits: list[tuple[Any, ...]]) -> bytes:
    out = bytearray(data)
    for kind, place, *rest in edits:
        if kind == "replace":
            out[place : place + len(rest[0])] = rest[0]
        elif kind == "edge":
            value, width = rest
            out[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == "splice":
            begin, end = sorted(rest)
            out[place:place] = out[begin:end]
        else:
            del out[place:]
    return bytes(out)
