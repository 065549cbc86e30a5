"""What a server process writes on its error output: a line an event, for people or for programs.

No prompt, completion or key is ever part of one. A record's own fields travel in
``extra={"fields": {...}}``.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

import msgspec

from rapshee_engine.errors import InvalidRequestError, RapsheeError
from rapshee_engine.server.request_facts import current_request_id

__all__ = ["LOG_FORMATS", "LOG_LEVELS", "JsonFormatter", "TextFormatter", "configure_logging"]

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")


def configure_logging(log_format: str, level: str) -> None:
    """Send the records of this process to its error output: ours from ``level`` on, those of
    libraries from warnings on (what they debug with may be what callers sent)."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(_is_news)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("rapshee_engine").setLevel(level.upper())
    logging.captureWarnings(True)


def _is_news(record: logging.LogRecord) -> bool:
    """Not the traceback of a stream that a second signal cut: that is what the signal is for, and
    the request's own line says that its answer is not complete."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:
        """A traceback without the messages of exceptions that we did not raise on purpose: those
        may quote what a caller sent."""
        return "".join(_traceback_lines(ei[1])).rstrip()

    def _parts(self, record: logging.LogRecord) -> dict[str, Any]:
        parts = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
        }
        request_id = current_request_id()
        if request_id is not None:
            parts["request_id"] = request_id
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        parts.update(fields)
        if record.exc_info and record.exc_info[1] is not None:
            parts["exception"] = self.formatException(record.exc_info)
        return parts


class JsonFormatter(_Formatter):
    """One JSON object a line: time (UTC), level, logger, message, then what is known."""

    def format(self, record: logging.LogRecord) -> str:
        return msgspec.json.encode(self._parts(record)).decode()


class TextFormatter(_Formatter):
    """``time LEVEL message name=value...``, and a traceback on the lines after it."""

    def format(self, record: logging.LogRecord) -> str:
        parts = self._parts(record)
        exception = parts.pop("exception", None)
        words = [parts.pop("time"), parts.pop("level").upper(), parts.pop("message")]
        del parts["logger"]
        words += [f"{name}={value}" for name, value in parts.items() if value is not None]
        line = _printable(" ".join(words))
        return line if exception is None else f"{line}\n{exception}"


def _utc(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _printable(text: str) -> str:
    """``text`` without line breaks and other characters by which it could pose as another line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _traceback_lines(error: BaseException) -> Iterator[str]:
    cause = error.__cause__
    if cause is None and not error.__suppress_context__:
        cause = error.__context__
    if cause is not None:
        yield from _traceback_lines(cause)
        yield "\nwhich led to:\n\n"
    yield from traceback.format_tb(error.__traceback__)
    is_ours = isinstance(error, RapsheeError) and not isinstance(error, InvalidRequestError)
    yield f"{type(error).__qualname__}: {error}\n" if is_ours else f"{type(error).__qualname__}\n"
