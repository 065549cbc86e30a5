"""Pure ASGI middleware: response headers, errors as JSON, the host guard."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rapshee_engine.server.errors import ApiError, error_response, to_api_error

__all__ = [
    "ErrorMiddleware",
    "LoopbackHostMiddleware",
    "RequestHeadersMiddleware",
    "new_request_id",
]

_CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LOOPBACK_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)


def new_request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


class RequestHeadersMiddleware:
    """Adds ``x-request-id`` (the client's own where it is well formed) and
    ``openai-processing-ms`` (until the response starts) to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _CLIENT_REQUEST_ID.fullmatch(asked) else new_request_id()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                elapsed_ms = (time.perf_counter() - started) * 1000
                headers["openai-processing-ms"] = str(round(elapsed_ms))
            await send(message)

        await self.app(scope, receive, send_with_headers)


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
