"""``/health/live`` and ``/health/ready``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rapshee_engine.server.drain import Drain
from rapshee_engine.server.registry import EngineRegistry

__all__ = ["HealthEndpoints"]


class HealthEndpoints:
    """Probes for whoever restarts the process or sends it traffic; no key is needed."""

    def __init__(self, registry: EngineRegistry, drain: Drain) -> None:
        self._registry = registry
        self._drain = drain

    def routes(self) -> list[Route]:
        return [
            Route("/health/live", self.live, methods=["GET"]),
            Route("/health/ready", self.ready, methods=["GET"]),
        ]

    async def live(self, _request: Request) -> Response:
        """200 as long as the event loop turns."""
        return JSONResponse({"status": "live"})

    async def ready(self, _request: Request) -> Response:
        """200 when every engine has its weights and its step loop moves, else 503; 503 too while
        the server waits for running requests before it ends."""
        if self._drain.is_draining:
            return _not_now({"status": "draining"})
        waiting_for = self._registry.not_ready()
        if waiting_for:
            return _not_now({"status": "not_ready", "models": waiting_for})
        return JSONResponse({"status": "ready"})


def _not_now(status: dict[str, Any]) -> Response:
    headers = {"retry-after": "1", "retry-after-ms": "1000"}
    return JSONResponse(status, status_code=503, headers=headers)
