"""The server process: sockets, clients that leave, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rapshee_engine.errors import ConfigError
from rapshee_engine.server.serve import bind

Live = Callable[..., Any]

BODY = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
HEADERS = {"authorization": "Bearer test-key"}

STANDALONE = """
import sys
from starlette.responses import PlainTextResponse
from rapshee_engine.server.drain import Drain
from rapshee_engine.server.serve import bind, serve
from rapshee_engine.server.settings import ServerSettings

with bind("127.0.0.1", 0) as listener:
    port = listener.getsockname()[1]
    serve(
        PlainTextResponse("hello"),
        ServerSettings(),
        listener,
        drain=Drain(),
        on_listening=lambda: print(port, sys.getswitchinterval(), flush=True),
        end_requests=lambda: None,
    )
print("closed", "h11" in sys.modules)
"""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_client_that_leaves_stops_its_generation(
    live: Live, engine: Any, path: str, stream: bool
) -> None:
    engine.before_token = lambda index: asyncio.Event().wait() if index else asyncio.sleep(0)
    request = json.dumps({**BODY, "prompt": ["hi", "ho"], "stream": stream}).encode()
    with live() as port:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/%s HTTP/1.1\r\nhost: localhost\r\n"
                b"authorization: Bearer test-key\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (path.encode(), len(request), request)
            )
            if stream:
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            assert not engine.ended.is_set()
        assert engine.ended.wait(30)


def test_the_first_token_is_sent_before_the_second_is_there(live: Live, engine: Any) -> None:
    engine.before_token = lambda index: asyncio.Event().wait() if index else asyncio.sleep(0)
    with live() as port, httpx.Client(timeout=30) as http:
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with http.stream("POST", url, json={**BODY, "stream": True}, headers=HEADERS) as answer:
            lines = (line for line in answer.iter_lines() if line)
            deltas = [json.loads(next(lines)[6:])["choices"][0]["delta"] for _ in range(2)]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "The"}]


def test_a_connection_serves_many_requests(live: Live) -> None:
    with live() as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        for _ in range(3):
            assert http.post("/v1/chat/completions", json=BODY, headers=HEADERS).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_with_status_0(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STANDALONE],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        port, switch_interval = process.stdout.readline().split()
        assert httpx.get(f"http://127.0.0.1:{port}/").text == "hello"
        assert float(switch_interval) < 0.005
        process.send_signal(number)
        assert process.stdout.read() == "closed False\n"
        assert process.wait(30) == 0


def test_a_port_in_use_is_one_line() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*--port"):
            bind("127.0.0.1", port)


def test_an_unknown_host_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"host '256\.1\.1\.1\.1'"):
        bind("256.1.1.1.1", 0)
