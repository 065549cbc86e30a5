"""The ASGI application: routes inside middleware."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from rapshee_engine.server.auth import BearerAuthMiddleware
from rapshee_engine.server.drain import Drain, DrainMiddleware
from rapshee_engine.server.middleware import (
    ErrorMiddleware,
    LoopbackHostMiddleware,
    RequestMiddleware,
)
from rapshee_engine.server.registry import EngineRegistry
from rapshee_engine.server.routes.chat import ChatEndpoints
from rapshee_engine.server.routes.completions import CompletionEndpoints
from rapshee_engine.server.routes.health import HealthEndpoints
from rapshee_engine.server.routes.metrics import MetricsEndpoints
from rapshee_engine.server.routes.models import ModelEndpoints
from rapshee_engine.server.settings import ServerSettings

__all__ = ["build_app"]


def build_app(
    registry: EngineRegistry,
    settings: ServerSettings,
    *,
    identify: Callable[[str], str | None] | None,
    drain: Drain | None = None,
) -> Starlette:
    """The application.

    Parameters:
        identify: id of a presented API key, or None for an unknown one. Without it there is no
            authentication, and only requests to a loopback ``Host`` are answered.
        drain: what the server ends by; without it the application takes requests as long as it
            lives.
    """
    guard = (
        Middleware(LoopbackHostMiddleware)
        if identify is None
        else Middleware(BearerAuthMiddleware, identify=identify)
    )
    drain = drain or Drain()
    app = Starlette(
        routes=[
            *ChatEndpoints(registry, settings).routes(),
            *CompletionEndpoints(registry, settings).routes(),
            *ModelEndpoints(registry).routes(),
            *HealthEndpoints(registry, drain).routes(),
            *MetricsEndpoints(registry).routes(),
        ],
        middleware=[
            Middleware(RequestMiddleware),
            Middleware(ErrorMiddleware),
            guard,
            Middleware(DrainMiddleware, drain=drain),
        ],
        exception_handlers={HTTPException: _pass_on},
    )
    # A redirect would be the one answer that is not JSON.
    app.router.redirect_slashes = False
    return app


async def _pass_on(_request: Request, error: Exception) -> Response:
    """Starlette would answer its routing errors in plain text; `ErrorMiddleware` does it better."""
    raise error
