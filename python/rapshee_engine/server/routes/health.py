"""``/health/live`` and ``/health/ready``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rapshee_engine.server.registry import EngineRegistry

__all__ = ["HealthEndpoints"]


class HealthEndpoints:
    """Probes for whoever restarts the process or sends it traffic; no key is needed."""

    def __init__(self, registry: EngineRegistry) -> None:
        self._registry = registry

    def routes(self) -> list[Route]:
        return [
            Route("/health/live", self.live, methods=["GET"]),
            Route("/health/ready", self.ready, methods=["GET"]),
        ]

    async def live(self, _request: Request) -> Response:
        """200 as long as the event loop turns."""
        return JSONResponse({"status": "live"})

    async def ready(self, _request: Request) -> Response:
        """200 when every engine has its weights and its step loop moves, else 503."""
        waiting_for = self._registry.not_ready()
        if waiting_for:
            return JSONResponse(
                {"status": "not_ready", "models": waiting_for},
                status_code=503,
                headers={"retry-after": "1", "retry-after-ms": "1000"},
            )
        return JSONResponse({"status": "ready"})
