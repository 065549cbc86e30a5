"""``/metrics``."""

from __future__ import annotations

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rapshee_engine.server.metrics import metrics_registry
from rapshee_engine.server.registry import EngineRegistry

__all__ = ["MetricsEndpoints"]


class MetricsEndpoints:
    """Numbers for whoever runs the server; no key is needed, as for its health."""

    def __init__(self, registry: EngineRegistry) -> None:
        self._metrics = metrics_registry(registry)

    def routes(self) -> list[Route]:
        return [Route("/metrics", self.metrics, methods=["GET"])]

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format, or OpenMetrics where the client asks for it."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # As a header: Starlette would add a charset of its own to a media type.
        return Response(encode(self._metrics), headers={"content-type": content_type})
