"""Bodies and their limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from rapshee_engine.server.body import read_json_body
from rapshee_engine.server.errors import ApiError


def read(pieces: Iterable[bytes | None], **headers: str) -> bytes:
    """Body of a request in pieces; None: the client leaves."""
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        piece = left.pop(0)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    fields = {"content-type": "application/json", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    request = Request({"type": "http", "method": "POST", "headers": raw}, receive)
    return asyncio.run(read_json_body(request, max_bytes=10))


def refused_status(pieces: Iterable[bytes], **headers: str) -> int:
    with pytest.raises(ApiError) as caught:
        read(pieces, **headers)
    return caught.value.status


def test_pieces_are_joined_up_to_the_limit() -> None:
    assert read([b"12345", b"", b"67890"]) == b"1234567890"
    assert read([b""]) == b""


def test_a_larger_body_is_413() -> None:
    assert refused_status([b"12345", b"678901"]) == 413
    # Nothing is read where the length is told.
    assert refused_status([], content_length="11") == 413


def test_compressed_bodies_are_415() -> None:
    assert refused_status([b"x"], content_encoding="gzip") == 415
    assert read([b"x"], content_encoding="identity") == b"x"


def test_a_client_that_leaves() -> None:
    with pytest.raises(ClientDisconnect):
        read([b"123", None])
