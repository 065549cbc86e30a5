"""Bearer authentication as ASGI middleware."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rapshee_engine.server.errors import ApiError
from rapshee_engine.server.request_facts import request_facts

__all__ = ["BearerAuthMiddleware"]

# Longer than any key; keeps junk away from hashing.
_MAX_AUTHORIZATION = 1024
_OPEN_PREFIX = "/health/"
_OPEN_PATH = "/metrics"


class BearerAuthMiddleware:
    """Lets through requests that carry a key that ``identify`` knows, and those of the operator's
    tools: ``/health/*`` and ``/metrics``, which tell nothing of any request.

    ``identify`` returns the id of a presented key, or None; it compares in constant time.
    """

    def __init__(self, app: ASGIApp, *, identify: Callable[[str], str | None]) -> None:
        self.app = app
        self.identify = identify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]):
            presented = _bearer(Headers(scope=scope).getlist("authorization"))
            key_id = None if presented is None else self.identify(presented)
            if key_id is None:
                raise ApiError(
                    401,
                    "Invalid API key provided",
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            request_facts().key = key_id
        await self.app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path == _OPEN_PATH or path.startswith(_OPEN_PREFIX)


def _bearer(values: list[str]) -> str | None:
    """The key of the one ``Authorization: Bearer KEY`` header, None if there is no such."""
    if len(values) != 1 or len(values[0]) > _MAX_AUTHORIZATION or not values[0].isascii():
        return None
    scheme, _, key = values[0].strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None
