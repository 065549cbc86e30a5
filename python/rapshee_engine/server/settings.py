"""Limits of the server."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ServerSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Bounds on what one client can make the server hold or wait for.

    Attributes:
        max_body_bytes: largest request body; beyond it 413.
        max_header_bytes: largest request line plus headers; beyond it 431.
        header_timeout_s: seconds a connection has to send its request line and headers; then 408.
        body_timeout_s: seconds a request has to send its body after that; then 408.
        write_timeout_s: seconds a client has to take the answer's bytes that wait for it; then the
            connection is cut.
        keep_alive_s: seconds an idle connection stays open. Longer than common clients keep theirs
            in a pool, so that no request is sent into a connection that is being closed.
        drain_timeout_s: seconds running requests have to end after SIGINT or SIGTERM.
        max_pending: most completions of one engine that run or wait; beyond it 503.
    """

    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 64 << 10
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0
    keep_alive_s: int = 75
    drain_timeout_s: float = 30.0
    max_pending: int = 1024
