"""Server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rapshee_engine.server.disconnect import until_disconnect

__all__ = ["DONE", "EventStream", "event"]

DONE = b"data: [DONE]\n\n"

_HEADERS = {
    "cache-control": "no-cache",
    # Reverse proxies such as nginx would otherwise hold events back.
    "x-accel-buffering": "no",
}


def event(data: bytes) -> bytes:
    """One event. ``data`` is JSON, which holds no raw line break."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Sends events as they come; a client that leaves closes their generator.

    Each item of ``events`` is a batch of whole events, sent in one write; it may be empty.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Sequence[bytes], None]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for batch in events:
                if batch:
                    body = b"".join(batch)
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
