"""Event framing."""

from __future__ import annotations

import asyncio
from typing import Any

from rapshee_engine.server.sse import DONE, EventStream, event


def test_framing() -> None:
    assert event(b"{}") == b"data: {}\n\n"
    assert DONE == b"data: [DONE]\n\n"


def test_a_batch_is_one_write() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def batches() -> Any:
        yield [b"a", b"b"]
        yield []
        yield [b"c"]

    asyncio.run(EventStream(batches())({"type": "http"}, receive, send))
    assert sent[0]["status"] == 200
    assert b"content-length" not in dict(sent[0]["headers"])
    assert [(m["body"], m["more_body"]) for m in sent[1:]] == [
        (b"ab", True),
        (b"c", True),
        (b"", False),
    ]
