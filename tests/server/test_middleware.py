"""Request ids, timing, errors, and the host guard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

from rapshee_engine.server.middleware import ErrorMiddleware

Send = Callable[..., httpx.Response]


@pytest.mark.parametrize("request_id", ["a", "req_1.2-3", "x" * 128])
def test_a_good_request_id_is_echoed(send: Send, request_id: str) -> None:
    response = send("GET", "/v1/models", headers={"x-request-id": request_id})
    assert response.headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "a\tb", "a<b>", "a;b"])
def test_any_other_is_replaced(send: Send, request_id: str) -> None:
    response = send("GET", "/v1/models", headers={"x-request-id": request_id})
    assert response.headers["x-request-id"] != request_id
    assert response.headers["x-request-id"].startswith("req_")


def test_made_ids_differ(send: Send) -> None:
    first, second = (send("GET", "/v1/models").headers["x-request-id"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:99"]
)
def test_loopback_hosts(send: Send, make_app: Callable[..., Any], host: str) -> None:
    app = make_app(auth=False)
    assert send("GET", "/v1/models", app=app, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["", "example.com", "localhost.example.com", "127.0.0.1.nip.io", "::1", "127.0.0.2", "x:y"],
)
def test_other_hosts(send: Send, make_app: Callable[..., Any], host: str) -> None:
    app = make_app(auth=False)
    assert send("GET", "/v1/models", app=app, headers={"host": host}).status_code == 403


class Failing:
    """An application that sends some messages, then raises."""

    def __init__(self, error: BaseException, *messages: dict[str, Any]) -> None:
        self.error = error
        self.messages = messages

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        for message in self.messages:
            await send(message)
        raise self.error


def sent_by(app: Failing) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing to receive")

    scope = {"type": "http", "method": "GET", "path": "/"}
    asyncio.run(ErrorMiddleware(app)(scope, receive, send))
    return sent


def test_an_error_becomes_a_response() -> None:
    start, body = sent_by(Failing(ValueError("secret")))
    assert start["status"] == 500
    assert b"secret" not in body["body"]


def test_an_error_after_the_start_goes_on() -> None:
    started = {"type": "http.response.start", "status": 200, "headers": []}
    with pytest.raises(ValueError, match="late"):
        sent_by(Failing(ValueError("late"), started))


def test_a_request_that_is_cancelled_is_told_why() -> None:
    start, body = sent_by(Failing(asyncio.CancelledError()))
    assert start["status"] == 503
    assert b"server_shutting_down" in body["body"]
    started = {"type": "http.response.start", "status": 200, "headers": []}
    with pytest.raises(asyncio.CancelledError):
        sent_by(Failing(asyncio.CancelledError(), started))


def test_a_client_that_left_gets_nothing() -> None:
    assert sent_by(Failing(ClientDisconnect())) == []
