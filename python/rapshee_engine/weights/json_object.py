"""Strict parsing of JSON objects from files that are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from rapshee_engine.errors import WeightFileError

__all__ = ["parse_json_object", "read_json_object"]

_MAX_FILE_BYTES = 16 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB.

    Raises:
        WeightFileError: the file cannot be read, is too large, or `parse_json_object` refuses it.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise WeightFileError(str(path), f"cannot be read: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise WeightFileError(str(path), f"is larger than {_MAX_FILE_BYTES >> 20} MiB")
    return parse_json_object(str(path), data)


def parse_json_object(file: str, data: bytes) -> dict[str, Any]:
    """``data`` as a JSON object; duplicate keys, NaN and infinities are refused.

    Raises:
        WeightFileError: naming ``file``.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
    except RecursionError:
        raise WeightFileError(file, "is nested too deeply") from None
    except ValueError as error:
        raise WeightFileError(file, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightFileError(file, "must hold a JSON object")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} is listed twice")
        result[key] = value
    return result
