"""Bounds on connections, with raw sockets against the real server."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

Live = Callable[..., Any]

HEAD = b"HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer test-key\r\n"
CHAT = b'{"model": "fake", "messages": [{"role": "user", "content": "hi"}]}'
CHAT = (
    b"POST /v1/chat/completions " + HEAD + b"content-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(CHAT), CHAT)
)
# Far longer than a test runs: only the bound under test can end the connection.
LONG = {"header_timeout_s": 600.0, "body_timeout_s": 600.0}
SHORT_S = 0.05


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def status_of_answer(connection: socket.socket) -> int:
    """Reads one whole answer."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        # The server closed with bytes of ours unread.
        pass
    return received


def refusal(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error object of an answer that closes its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.split(": ") for line in lines[1:])
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    assert headers["openai-processing-ms"]
    assert int(headers["content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(lines[0].split()[1]), error


def test_headers_within_the_bound_pass(live: Live) -> None:
    with live(max_header_bytes=1000, **LONG) as port, connect(port) as connection:
        for _ in range(3):
            connection.sendall(b"GET /v1/models " + HEAD + b"x: " + b"y" * 800 + b"\r\n\r\n")
            assert status_of_answer(connection) == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /v1/models " + HEAD + b"x: " + b"y" * 1000 + b"\r\n\r\n",
        b"GET /v1/models " + HEAD + b"x: y\r\n" * 1000 + b"\r\n",
        b"GET /" + b"x" * 1000 + b" " + HEAD + b"\r\n",
        # Lines that never end.
        b"GET /v1/models " + HEAD + b"x: " + b"y" * 1000,
        b"GET /v1/models " + HEAD + b"x" * 1000,
        b"GET /" + b"x" * 1000,
        b"\r\n" * 1000,
    ],
)
def test_larger_headers_are_431(live: Live, request_bytes: bytes) -> None:
    with live(max_header_bytes=1000, **LONG) as port, connect(port) as connection:
        connection.sendall(request_bytes)
        status, error = refusal(until_closed(connection))
        assert status == 431
        assert error["type"] == "invalid_request_error"


def test_headers_in_many_pieces_are_counted_together(live: Live) -> None:
    with live(max_header_bytes=1000, **LONG) as port, connect(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"GET /v1/models " + HEAD)
        for _ in range(100):
            try:
                connection.sendall(b"x: 34567890\r\n")
            except OSError:
                break
        assert refusal(until_closed(connection))[0] == 431


def test_trailers_are_counted_and_dropped(live: Live) -> None:
    post = b"POST /v1/chat/completions " + HEAD
    post += b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    post += b"2\r\n{}\r\n0\r\n"
    with live(max_header_bytes=1000, **LONG) as port:
        with connect(port) as connection:
            connection.sendall(post + b"authorization: x\r\n\r\n")
            assert status_of_answer(connection) == 400
        with connect(port) as connection:
            connection.sendall(post + b"x: 34567890\r\n" * 200)
            until_closed(connection)


OFFER = b"connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nhttp2-settings: x\r\n"


def test_an_offer_of_http_2_is_ignored(live: Live) -> None:
    head, _, body = CHAT.partition(b"\r\n\r\n")
    with live(**LONG) as port, connect(port) as connection:
        for _ in range(2):
            connection.sendall(b"GET /v1/models " + HEAD + OFFER + b"\r\n")
            assert status_of_answer(connection) == 200
            connection.sendall(head + b"\r\n" + OFFER + b"\r\n" + body)
            assert status_of_answer(connection) == 200


def test_an_offer_in_two_pieces_ends_the_connection(live: Live) -> None:
    with live(**LONG) as port, connect(port) as connection:
        before, after = OFFER.split(b"h2c")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"GET /v1/models " + HEAD + before[:-4])
        with connect(port) as other:
            # Its answer shows that the server has read the piece before.
            other.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert status_of_answer(other) == 200
        connection.sendall(before[-4:] + b"h2c" + after + b"\r\n")
        assert until_closed(connection).startswith(b"HTTP/1.1 200")


def test_what_is_no_http_is_400(live: Live) -> None:
    for junk in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"CONNECT localhost:1 " + HEAD + b"\r\n",
    ):
        with live(**LONG) as port, connect(port) as connection:
            connection.sendall(junk)
            assert refusal(until_closed(connection))[0] == 400


@pytest.mark.parametrize("sent", [b"", b"GET /v1/mod", b"GET /v1/models " + HEAD, b"\r\n"])
def test_slow_headers_are_408(live: Live, sent: bytes) -> None:
    with live(header_timeout_s=SHORT_S, body_timeout_s=600.0) as port, connect(port) as connection:
        connection.sendall(sent)
        assert refusal(until_closed(connection))[0] == 408


@pytest.mark.parametrize("body", [b"", b'{"model":'])
def test_slow_bodies_are_408(live: Live, body: bytes) -> None:
    head = HEAD + b"content-type: application/json\r\ncontent-length: 100\r\n\r\n"
    with live(header_timeout_s=600.0, body_timeout_s=SHORT_S) as port, connect(port) as connection:
        connection.sendall(b"POST /v1/chat/completions " + head + body)
        assert refusal(until_closed(connection))[0] == 408


def test_a_body_that_nobody_waits_for_has_its_time_too(live: Live) -> None:
    head = HEAD + b"content-length: 100\r\n\r\n"
    with live(header_timeout_s=600.0, body_timeout_s=SHORT_S) as port, connect(port) as connection:
        connection.sendall(b"POST /nowhere " + head)
        answer = until_closed(connection)
        assert answer.startswith(b"HTTP/1.1 404")
        assert answer.count(b"HTTP/1.1") == 1


def test_a_slow_second_request_has_its_time_too(live: Live) -> None:
    with live(header_timeout_s=SHORT_S, body_timeout_s=600.0) as port, connect(port) as connection:
        connection.sendall(b"GET /v1/models " + HEAD + b"\r\n")
        assert status_of_answer(connection) == 200
        connection.sendall(b"GET /v1")
        assert refusal(until_closed(connection))[0] == 408


NEXT = [b"GET /v1", b"GET /v1/models " + HEAD + b"content-length: 5\r\n\r\n", CHAT]


@pytest.mark.parametrize("second", NEXT)
@pytest.mark.parametrize("apart", [False, True])
def test_a_request_before_the_answer_is_dropped(
    live: Live, engine: Any, second: bytes, apart: bool
) -> None:
    going, seen = threading.Event(), threading.Event()

    async def wait(_index: int) -> None:
        seen.set()
        await asyncio.to_thread(going.wait)

    engine.before_token = wait
    with live(**LONG) as port, connect(port) as connection:
        connection.sendall(CHAT if apart else CHAT + second)
        assert seen.wait(30)
        if apart:
            connection.sendall(second)
            # An answer on another connection: the server has read the piece before.
            with connect(port) as other:
                other.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
                assert status_of_answer(other) == 200
        going.set()
        answers = until_closed(connection)
        assert answers.startswith(b"HTTP/1.1 200")
        assert answers.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("second", NEXT)
def test_a_client_that_leaves_early_is_noticed(live: Live, engine: Any, second: bytes) -> None:
    seen = threading.Event()

    async def wait(_index: int) -> None:
        seen.set()
        await asyncio.Event().wait()

    engine.before_token = wait
    with live(**LONG) as port:
        with connect(port) as connection:
            connection.sendall(CHAT + second)
            assert seen.wait(30)
        assert engine.ended.wait(30)


def test_a_client_that_does_not_read_is_cut_off(live: Live, engine: Any) -> None:
    # More than the buffers of both sockets hold.
    fields = {"stream": True, "n": 128, "max_tokens": 30, "logprobs": True, "top_logprobs": 20}
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps({"model": "fake", "messages": messages, **fields}).encode()
    head = HEAD + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    with live(write_timeout_s=SHORT_S, **LONG) as port, connect(port) as connection:
        connection.sendall(b"POST /v1/chat/completions " + head + body)
        assert engine.ended.wait(30)
        assert not until_closed(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_too_large_a_body_is_413(live: Live) -> None:
    head = HEAD + b"content-type: application/json\r\n"
    with live(max_body_bytes=1000, **LONG) as port:
        with connect(port) as connection:
            connection.sendall(
                b"POST /v1/chat/completions " + head + b"content-length: 1001\r\n\r\n"
            )
            assert refusal_after_date(until_closed(connection)) == 413
        with connect(port) as connection:
            connection.sendall(
                b"POST /v1/chat/completions " + head + b"transfer-encoding: chunked\r\n\r\n"
                b"7d0\r\n" + b"x" * 2000 + b"\r\n"
            )
            assert refusal_after_date(until_closed(connection)) == 413


def refusal_after_date(answer: bytes) -> int:
    """Status of an answer by the application, which puts its headers in another order."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "request_too_large"
    return int(head.split()[1])
