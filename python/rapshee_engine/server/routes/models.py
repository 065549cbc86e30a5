"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rapshee_engine.server.registry import EngineRegistry, ServedModel

__all__ = ["ModelEndpoints"]


class ModelEndpoints:
    """Lists what can be asked for."""

    def __init__(self, registry: EngineRegistry) -> None:
        self._registry = registry

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list, methods=["GET"]),
            # Names may hold slashes.
            Route("/v1/models/{name:path}", self.retrieve, methods=["GET"]),
        ]

    async def list(self, _request: Request) -> Response:
        data = [_model_object(model) for model in self._registry]
        return JSONResponse({"object": "list", "data": data})

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(_model_object(self._registry.get(request.path_params["name"])))


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "rapshee",
    }
