"""The log: what a line says, and what none ever says."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from rapshee_engine.errors import EngineDeadError, StepError
from rapshee_engine.server.logs import configure_logging

Send = Callable[..., httpx.Response]

SECRET = "xylophone"


class Log:
    """The process's log, in memory."""

    def __init__(self) -> None:
        self._stream = io.StringIO()

    def configure(self, log_format: str, level: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", self._stream)
            configure_logging(log_format, level)

    def read(self) -> str:
        """What was logged since it was read last."""
        text = self._stream.getvalue()
        self._stream.truncate(self._stream.seek(0))
        return text

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.read().splitlines()]


@pytest.fixture
def log() -> Iterator[Log]:
    """At level debug, as JSON."""
    ours, root = logging.getLogger("rapshee_engine"), logging.getLogger()
    before = ours.level, root.level, root.handlers
    log = Log()
    log.configure("json", "debug")
    yield log
    logging.captureWarnings(False)
    ours.level, root.level, root.handlers = before


def test_a_request_is_an_object_on_a_line(chat: Callable[..., httpx.Response], log: Log) -> None:
    answer = chat(max_tokens=3, n=2)
    (entry,) = log.entries()
    assert entry.pop("time")[-1] == "Z"
    assert entry.pop("duration_ms") >= 0
    assert entry == {
        "level": "info",
        "logger": "rapshee_engine.server.middleware",
        "message": "request",
        "request_id": answer.headers["x-request-id"],
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "complete": True,
        "model": "fake",
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "key": "id",
    }


def test_a_stream_is_counted_too(chat: Callable[..., httpx.Response], log: Log) -> None:
    chat(max_tokens=3, n=2, stream=True)
    (entry,) = log.entries()
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (4, 6)


def test_what_is_not_known_is_null(send: Send, log: Log) -> None:
    send("GET", "/v1/models", key="wrong")
    send("GET", "/nowhere?key=" + SECRET)
    refused, unknown = log.entries()
    assert (refused["status"], refused["key"], refused["model"]) == (401, None, None)
    assert (unknown["status"], unknown["path"], unknown["completion_tokens"]) == (
        404,
        "/nowhere",
        None,
    )


def test_probes_are_for_debugging(send: Send, log: Log) -> None:
    send("GET", "/health/live", key=None)
    assert [entry["level"] for entry in log.entries()] == ["debug"]
    log.configure("json", "info")
    send("GET", "/health/live", key=None)
    assert log.entries() == []


def test_no_part_of_a_failed_request_is_logged(
    chat: Callable[..., httpx.Response], engine: Any, log: Log
) -> None:
    def fail(_index: int) -> None:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"cannot say {SECRET}") from error

    engine.before_token = fail
    answer = chat(messages=[{"role": "user", "content": SECRET}])
    assert answer.status_code == 500
    failure, request = log.entries()
    assert failure["request_id"] == request["request_id"] == answer.headers["x-request-id"]
    assert failure["exception"].splitlines()[-1] == "ValueError"
    assert "KeyError\n" in failure["exception"]
    assert "in fail" in failure["exception"]
    assert SECRET not in json.dumps([failure, request])


def test_our_own_errors_say_what_they_are(
    chat: Callable[..., httpx.Response], engine: Any, log: Log
) -> None:
    def fail(_index: int) -> None:
        raise StepError("a step failed") from EngineDeadError("out of memory")

    engine.before_token = fail
    chat()
    text = log.entries()[0]["exception"]
    assert text.index("EngineDeadError: out of memory") < text.index("StepError: a step failed")


def test_text_is_a_line_whatever_is_in_it(send: Send, log: Log) -> None:
    log.configure("text", "info")
    send("GET", "/a%0A2026 ERROR b", headers={"x-request-id": "req-1"})
    (line,) = log.read().splitlines()
    words = line.split(" ")
    assert words[1:5] == ["INFO", "request", "request_id=req-1", "method=GET"]
    assert "path=/a%0A2026%20ERROR%20b" in words
    logging.getLogger("rapshee_engine").warning("one\ntwo \x1b[31m")
    assert log.read().endswith("WARNING one\\ntwo \\x1b[31m\n")


def test_levels(log: Log) -> None:
    log.configure("text", "error")
    logging.getLogger("rapshee_engine.server").warning("ours")
    logging.getLogger("somebody").info("not ours")
    assert log.read() == ""
    log.configure("text", "debug")
    logging.getLogger("somebody").info("not ours")
    assert log.read() == ""


def test_a_stream_that_was_cut_is_no_failure(log: Log) -> None:
    for error, num_entries in ((asyncio.CancelledError(), 0), (RuntimeError(), 1)):
        logging.getLogger("uvicorn.error").error("Exception in ASGI application", exc_info=error)
        assert len(log.entries()) == num_entries


def test_warnings_are_logged(log: Log) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look out", stacklevel=1)
    (entry,) = log.entries()
    assert entry["level"] == "warning"
    assert "look out" in entry["message"]
