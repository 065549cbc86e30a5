"""The OpenAI-compatible HTTP server. `build_app` makes the ASGI application."""

from __future__ import annotations

from rapshee_engine.server.app import build_app
from rapshee_engine.server.registry import EngineRegistry
from rapshee_engine.server.settings import ServerSettings

__all__ = ["EngineRegistry", "ServerSettings", "build_app"]
