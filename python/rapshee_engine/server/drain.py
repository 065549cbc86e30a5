"""Ending a server without losing a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from rapshee_engine.server.errors import ApiError

__all__ = ["Drain", "DrainMiddleware"]

_WORK_PREFIX = "/v1/"


class Drain:
    """Whether new work is taken, and how much is running. Owned by the event loop, but for `begin`,
    which any thread and a signal handler may call."""

    def __init__(self) -> None:
        self.is_draining = False
        self.num_running = 0

    def begin(self) -> None:
        """Take no new work from now on."""
        self.is_draining = True

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request as running.

        Raises:
            ApiError: 503, the server is draining.
        """
        if self.is_draining:
            error = ApiError.try_later(
                "The server is shutting down and takes no new requests.", code="server_overloaded"
            )
            error.headers["connection"] = "close"
            raise error
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1


class DrainMiddleware:
    """Passes API requests through a `Drain`; health probes and the like are always answered."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_WORK_PREFIX):
            await self.app(scope, receive, send)
            return
        if self.drain.is_draining:
            # Closing a connection with unread bytes resets it, and the client might not see why.
            while (await receive()).get("more_body"):
                pass
        with self.drain.admit():
            await self.app(scope, receive, send)
