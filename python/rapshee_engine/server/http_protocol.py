"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks on headers and on slow clients."""

from __future__ import annotations

import asyncio
import http
import re
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from rapshee_engine.server.errors import ApiError, error_json
from rapshee_engine.server.middleware import new_request_id
from rapshee_engine.server.settings import ServerSettings

__all__ = ["BoundedHttpProtocol"]


_UPGRADE = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)


class _Stop(Exception):
    """Raised inside a parser callback, which makes the parser stop."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection.

    A request is read in two phases, head (request line and headers) and body, each with a deadline;
    between requests uvicorn's keep-alive timer runs. A client that misses a deadline gets 408, one
    that sends too large a head 431; then the connection is closed. One that does not read its
    answer is cut off, so that it does not hold the answer's memory and place for ever.

    Requests are not pipelined: one that comes before the answer to the one before it is complete is
    dropped, and the connection closed after that answer (RFC 9112, 9.3.2). uvicorn would stop
    reading then, and so not notice that the client left.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        settings: ServerSettings,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._settings = settings
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._reading_head = True
        # Bytes of the head: as received while it is incomplete (a line that never ends reaches no
        # callback), as parsed once it is complete (it may have come in one piece with a body).
        self._received_head_bytes = 0
        self._parsed_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline(self._settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._clear_write_deadline()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(
            self._settings.write_timeout_s, self.transport.abort
        )

    def resume_writing(self) -> None:
        self._clear_write_deadline()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._is_pipelined():
            self.cycle.keep_alive = False
            return
        if self._reading_head:
            self._received_head_bytes += len(data)
            if self._deadline is None:
                self._set_deadline(self._settings.header_timeout_s)
            data = _without_upgrade(data)
        super().data_received(data)
        too_large = self._received_head_bytes > self._settings.max_header_bytes
        if self._reading_head and too_large and not self.transport.is_closing():
            self._refuse(431)

    def on_message_begin(self) -> None:
        if self._is_pipelined():
            self.cycle.keep_alive = False
            raise _Stop
        super().on_message_begin()
        self._parsed_head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come here too; after the head they count, and are otherwise of no use.
        self._count_head(len(name) + len(value) + len(": \r\n"))
        if self._reading_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()  # refuses a target that is no URL, which ends the head too
        self._reading_head = False
        self._set_deadline(self._settings.body_timeout_s)
        if self.parser.should_upgrade():
            # A header that came in two pieces. The parser stops after this request.
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._clear_deadline()
        self._reading_head = True
        self._received_head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, _msg: str) -> None:
        if self._is_pipelined():
            return
        too_large = self._parsed_head_bytes > self._settings.max_header_bytes
        self._refuse(431 if too_large else 400)

    def _count_head(self, num_bytes: int) -> None:
        self._parsed_head_bytes += num_bytes
        if self._parsed_head_bytes > self._settings.max_header_bytes:
            raise _Stop

    def _set_deadline(self, seconds: float) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(seconds, self._refuse, 408)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _clear_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _refuse(self, status: int) -> None:
        """Answer outside the application, unless its own answer has begun, and close."""
        self._clear_deadline()
        if self._reading_head or not self.cycle.response_started:
            self.transport.write(_response(status))
        self.transport.close()

    def _is_pipelined(self) -> bool:
        """Whether what comes now belongs to a request after the one that is being answered."""
        return self._reading_head and self.cycle is not None and not self.cycle.response_complete


def _without_upgrade(data: bytes) -> bytes:
    """``data`` with an ``Upgrade`` header of its head renamed.

    Some clients offer HTTP/2 in this way with every request. A server may ignore the offer (RFC
    9110, 7.8), but httptools would take the body for the other protocol and drop it.
    """
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return _UPGRADE.sub(b"\r\nignored", head) + data[len(head) :]


def _response(status: int) -> bytes:
    phrase = http.HTTPStatus(status).phrase
    messages = {
        400: "The request is not valid HTTP",
        408: "The request was not sent in time",
        431: "The request line and headers are too large",
    }
    body = error_json(ApiError(status, messages[status]))
    head = (
        f"HTTP/1.1 {status} {phrase}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        f"x-request-id: {new_request_id()}\r\n"
        "openai-processing-ms: 0\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
