"""The application as a whole: what every answer has, and what is at no path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

Send = Callable[..., httpx.Response]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/chat/completions/", "/v1//"])
def test_unknown_paths_are_json_404(send: Send, path: str) -> None:
    response = send("GET", path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert path in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("DELETE", "/v1/models", {"GET", "HEAD"}),
        ("POST", "/v1/models/fake", {"GET", "HEAD"}),
        ("POST", "/health/live", {"GET", "HEAD"}),
    ],
)
def test_wrong_methods_are_json_405(send: Send, method: str, path: str, allowed: set[str]) -> None:
    response = send(method, path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == allowed
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/models", "test-key", 200),
        ("/v1/models", "wrong", 401),
        ("/nowhere", "test-key", 404),
        ("/health/live", None, 200),
    ],
)
def test_every_answer_has_the_common_headers(
    send: Send, path: str, key: str | None, status: int
) -> None:
    response = send("GET", path, key=key)
    assert response.status_code == status
    assert response.headers["x-request-id"]
    assert int(response.headers["openai-processing-ms"]) >= 0
    assert response.headers["content-type"] == "application/json"
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


def test_without_authentication_only_loopback_hosts_are_served(
    send: Send, make_app: Callable[..., Any]
) -> None:
    app = make_app(auth=False)
    for path in ("/v1/models", "/health/live"):
        assert send("GET", path, app=app, key=None).status_code == 200
        response = send("GET", path, app=app, key=None, headers={"host": "evil.example"})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"


def test_with_authentication_any_host_is_served(send: Send) -> None:
    assert send("GET", "/v1/models", headers={"host": "api.example"}).status_code == 200
