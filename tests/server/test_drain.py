"""The end of a server: running requests finish, new ones are told, nothing waits for ever."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from rapshee_engine.errors import EngineClosedError
from rapshee_engine.server.drain import Drain

BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
HEADERS = {"authorization": "Bearer test-key"}
CHAT = "/v1/chat/completions"


@dataclass
class Draining:
    """A server with a stream that began before it was told to end."""

    http: httpx.Client
    stream: Iterator[str]
    server: Any
    release: threading.Event


@pytest.fixture
def draining(live_server: Callable[..., Any], engine: Any) -> Callable[..., Any]:
    """Context manager: yields a server that drains while a stream waits for ``release``."""

    @contextmanager
    def running(**options: Any) -> Iterator[Draining]:
        release = threading.Event()

        async def until_released(index: int) -> None:
            if index:
                await asyncio.to_thread(release.wait)
                if engine.closing.is_set():
                    raise EngineClosedError("closed")

        engine.before_token = until_released
        engine.closing = Closing(release)
        with (
            httpx.Client(timeout=60, headers=HEADERS) as http,
            live_server(**options) as (server, port),
        ):
            http.base_url = httpx.URL(f"http://127.0.0.1:{port}")
            with http.stream("POST", CHAT, json={**BODY, "stream": True}) as answer:
                assert answer.status_code == 200
                http.get("/health/live")  # a second connection, which stays open
                server.handle_exit(signal.SIGTERM, None)
                lines = (line for line in answer.iter_lines() if line)
                yield Draining(http, lines, server, release)
                release.set()

    return running


class Closing(threading.Event):
    """Set when the server ends its requests, which then go on, to their error."""

    def __init__(self, release: threading.Event) -> None:
        super().__init__()
        self._release = release

    def set(self) -> None:
        super().set()
        self._release.set()


def test_a_running_stream_ends_as_if_nothing_had_happened(
    draining: Callable[..., Any], engine: Any
) -> None:
    with draining(drain_timeout_s=600) as scene:
        scene.release.set()
        lines = list(scene.stream)
    assert lines[-1] == "data: [DONE]"
    text = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(text) == "The moon is a grey caf\u00e9!"
    assert not engine.closing.is_set()


@pytest.mark.parametrize("size", [1, 1 << 20])
@pytest.mark.parametrize("fresh", [False, True])
def test_new_work_is_told_to_come_back(
    draining: Callable[..., Any], fresh: bool, size: int
) -> None:
    with draining() as scene, httpx.Client(base_url=scene.http.base_url) as other:
        http = other if fresh else scene.http
        body = {**BODY, "user": "x" * size}
        refused = http.post(CHAT, json=body, headers=HEADERS)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_overloaded"
        assert refused.json()["error"]["type"] == "server_error"
        assert refused.headers["connection"] == "close"
        assert refused.headers["retry-after"] == "1"
        assert http.post(CHAT, json=body, headers={"authorization": "x"}).status_code == 401


def test_health_says_that_it_drains(draining: Callable[..., Any]) -> None:
    with draining() as scene:
        ready = scene.http.get("/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert scene.http.get("/health/live").status_code == 200


def test_after_the_timeout_requests_fail(draining: Callable[..., Any], engine: Any) -> None:
    with draining(drain_timeout_s=0) as scene:
        *_, last = scene.stream
    assert json.loads(last[6:])["error"]["code"] == "server_shutting_down"
    assert engine.closing.is_set()


def test_a_second_signal_ends_it_at_once(draining: Callable[..., Any], engine: Any) -> None:
    with draining(drain_timeout_s=600) as scene:
        scene.server.handle_exit(signal.SIGINT, None)
        with pytest.raises(httpx.RemoteProtocolError, match="closed connection"):
            list(scene.stream)
        assert engine.ended.wait(30)
    assert not engine.closing.is_set()


def test_a_request_that_fails_does_not_hold_the_end_up() -> None:
    drain = Drain()
    with pytest.raises(ValueError, match="x"), drain.admit():
        raise ValueError("x")
    assert drain.num_running == 0
