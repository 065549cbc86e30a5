"""Running the application as a process's main job."""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from rapshee_engine.errors import ConfigError
from rapshee_engine.server.drain import Drain
from rapshee_engine.server.http_protocol import BoundedHttpProtocol
from rapshee_engine.server.settings import ServerSettings

__all__ = ["HttpServer", "bind", "serve"]

_logger = logging.getLogger(__name__)

# The engine thread holds the GIL only between native calls. A tenth of the default lets the event
# loop answer soon while it builds a step.
_SWITCH_INTERVAL_S = 0.0005

# Seconds that requests have to say that the engine was closed, before their tasks are cancelled.
_LAST_WORDS_S = 5


class HttpServer(uvicorn.Server):
    """uvicorn's server, which drains before it ends, with callbacks.

    From the first signal on, the application refuses new work (that is ``drain``'s part), while
    connections are still accepted and answered. When all requests have ended, or after
    ``drain_timeout_s``, the server closes everything and ends normally. A second signal ends it at
    once.

    ``on_listening`` is called when clients can connect; ``end_requests``, in a thread, when the
    timeout is over, and makes the requests that still run fail.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        *,
        drain: Drain,
        on_listening: Callable[[], None],
        end_requests: Callable[[], None],
    ) -> None:
        protocol = functools.partial(BoundedHttpProtocol, settings=settings)
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=protocol,  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                # Its warnings are about what clients sent: nothing for the operator to act on.
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=_LAST_WORDS_S,
            )
        )
        self._drain = drain
        self._drain_timeout_s = settings.drain_timeout_s
        self._drain_deadline: float | None = None
        self._on_listening = on_listening
        self._end_requests = end_requests

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        """Whether to leave the main loop; asked ten times a second."""
        if await super().on_tick(counter):
            return True
        if not self._drain.is_draining:
            return False
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + self._drain_timeout_s
            self._log("draining", timeout_s=self._drain_timeout_s)
        return not self._drain.num_running or time.monotonic() >= self._drain_deadline

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._drain.num_running and not self.force_exit:
            self._log("drain timeout is over: ending what still runs")
            await asyncio.to_thread(self._end_requests)
        self._log("closing")
        await super().shutdown(sockets)

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """Drain, on a second signal stop at once. uvicorn's own also remembers the signal and
        raises it again at the end, so that an orderly stop would look like a crash."""
        if self._drain.is_draining:
            self.force_exit = self.should_exit = True
            return
        self._drain.begin()

    def _log(self, message: str, **fields: Any) -> None:
        fields["running"] = self._drain.num_running
        _logger.info(message, extra={"fields": fields})


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; the server makes it listen.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on host {host!r}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from None
    return listener


def serve(
    app: ASGIApp,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    drain: Drain,
    on_listening: Callable[[], None],
    end_requests: Callable[[], None],
) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Call it in a process of its own, from the main
    thread."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    server = HttpServer(
        app, settings, drain=drain, on_listening=on_listening, end_requests=end_requests
    )
    server.run(sockets=[listener])
