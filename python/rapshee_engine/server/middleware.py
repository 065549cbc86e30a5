"""Pure ASGI middleware: response headers and the access log, errors as JSON, the host guard."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import urllib.parse
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rapshee_engine.errors import EngineClosedError
from rapshee_engine.server.errors import ApiError, error_response, to_api_error
from rapshee_engine.server.request_facts import RequestFacts, begin_request

__all__ = [
    "ErrorMiddleware",
    "LoopbackHostMiddleware",
    "RequestMiddleware",
    "new_request_id",
]

_logger = logging.getLogger(__name__)

_PROBES = ("/health/", "/metrics")
_MAX_LOGGED_PATH = 256
_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LOOPBACK_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)


def new_request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


class RequestMiddleware:
    """Adds ``x-request-id`` (the client's own where it is well formed) and
    ``openai-processing-ms`` (until the response starts) to every response, and logs every request
    when it has ended, probes at level debug."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        asked = Headers(scope=scope).get("x-request-id", "")
        facts = begin_request(asked if _CLIENT_REQUEST_ID.fullmatch(asked) else new_request_id())
        status: int | None = None
        is_complete = False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = facts.request_id
                headers["openai-processing-ms"] = str(_ms_since(started))
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            outcome = {"status": status, "complete": is_complete}
            _log_request(scope, facts, {**outcome, "duration_ms": _ms_since(started)})


def _ms_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


def _log_request(scope: Scope, facts: RequestFacts, outcome: Mapping[str, Any]) -> None:
    """A client that left before there was a status leaves None."""
    path: str = scope["path"]
    fields = {
        "method": scope["method"],
        # Without the query, in which some clients put keys.
        "path": urllib.parse.quote(path[:_MAX_LOGGED_PATH]),
        **outcome,
        **facts.fields(),
    }
    level = logging.DEBUG if path.startswith(_PROBES) else logging.INFO
    _logger.log(level, "request", extra={"fields": fields})


class ErrorMiddleware:
    """Turns every exception from within into the API's error object.

    Once a response has started nothing can be turned: the exception goes on to the HTTP server,
    which closes the connection. Streams report their own errors before it comes to that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response_started = False

        async def watched_send(message: Message) -> None:
            nonlocal response_started
            response_started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:
            # The server ends at once. Unanswered, the HTTP server would answer 500.
            if response_started:
                raise
            error = EngineClosedError("the server ends")
            await error_response(to_api_error(error, scope))(scope, receive, send)
        except Exception as error:
            if response_started:
                raise
            await error_response(to_api_error(error, scope))(scope, receive, send)


class LoopbackHostMiddleware:
    """Refuses requests whose ``Host`` is not this machine's loopback.

    It guards a server without keys: a page in a browser can make its own host name resolve to
    127.0.0.1 and so reach the server, but it cannot send another ``Host`` than its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or not _LOOPBACK_HOST.fullmatch(hosts[0]):
                raise ApiError(
                    403,
                    "A server without authentication answers only to the host names localhost, "
                    "127.0.0.1 and [::1].",
                    code="host_not_allowed",
                )
        await self.app(scope, receive, send)
