"""``/health``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

Send = Callable[..., httpx.Response]


def test_live_always(send: Send, engine: Any) -> None:
    engine.is_ready = False
    assert send("GET", "/health/live", key=None).json() == {"status": "live"}


def test_ready_when_all_engines_are(send: Send, engine: Any) -> None:
    response = send("GET", "/health/ready", key=None)
    assert (response.status_code, response.json()) == (200, {"status": "ready"})
    engine.is_ready = False
    response = send("GET", "/health/ready", key=None)
    assert response.status_code == 503
    assert response.json() == {"status": "not_ready", "models": ["fake", "fake-mini"]}
    assert response.headers["retry-after-ms"] == "1000"
