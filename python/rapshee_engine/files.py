"""Reading files of a checkpoint, none of which is trusted.

Symbolic links are followed: a checkpoint in Hugging Face's cache is a folder of links to its blobs.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from reprlib import Repr
from typing import Any, BinaryIO, NoReturn

from rapshee_engine.errors import WeightFileError

__all__ = [
    "is_there",
    "open_regular",
    "parse_json_object",
    "read_file",
    "read_json_object",
    "read_optional_json_object",
    "short_repr",
]

_MAX_JSON_BYTES = 16 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def open_regular(path: str | Path) -> tuple[BinaryIO, int]:
    """Open a regular file; the stream and the file's size in bytes.

    Raises:
        WeightFileError: it cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer; regular files ignore it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise WeightFileError(str(path), f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the path
        raise WeightFileError(str(path), f"cannot be read: {error}") from error
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise WeightFileError(str(path), "cannot be read: it is not a regular file")
    return os.fdopen(descriptor, "rb"), info.st_size


def read_file(path: str | Path, max_bytes: int) -> bytes:
    """All of a regular file.

    Raises:
        WeightFileError: it cannot be read, or is larger than ``max_bytes``.
    """
    stream, size = open_regular(path)
    with stream:
        if size > max_bytes:
            raise WeightFileError(str(path), f"is larger than {max_bytes >> 20} MiB")
        try:
            data = stream.read(size + 1)  # one byte more: a file that grows meanwhile shows
        except OSError as error:
            raise WeightFileError(str(path), f"cannot be read: {error.strerror}") from error
    if len(data) != size:
        raise WeightFileError(str(path), "changed while it was read")
    return data


def is_there(path: str | Path) -> bool:
    """Whether something lies at ``path``, of whatever kind.

    Raises:
        WeightFileError: it cannot be told.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise WeightFileError(str(path), f"cannot be read: {error}") from error
    return True


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB.

    Raises:
        WeightFileError: the file cannot be read, is too large, or `parse_json_object` refuses it.
    """
    return parse_json_object(str(path), read_file(path, _MAX_JSON_BYTES))


def read_optional_json_object(path: str | Path) -> dict[str, Any]:
    """As `read_json_object`; an empty object where there is no such file."""
    return read_json_object(path) if is_there(path) else {}


def parse_json_object(file: str, data: bytes) -> dict[str, Any]:
    """``data`` as a JSON object. Duplicate keys, numbers that are not finite, and strings that are
    no Unicode are refused.

    Raises:
        WeightFileError: naming ``file``.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique_keys,
        )
        if _SURROGATE.search(data):  # in pairs they are fine
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise WeightFileError(file, "is nested too deeply") from None
    except ValueError as error:
        raise WeightFileError(file, f"is not valid JSON: {error!s:.300}") from None
    if not isinstance(value, dict):
        raise WeightFileError(file, "must hold a JSON object")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is not a finite number")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r:.200} is listed twice")
        result[key] = value
    return result


def short_repr(value: object) -> str:
    """A value for a message: ``repr``, but short, and cheap however large or deep the value is."""
    shortener = Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 200
    shortener.maxlevel = 3
    return shortener.repr(value)[:400]
