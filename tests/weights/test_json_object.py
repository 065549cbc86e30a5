from __future__ import annotations

from pathlib import Path

import pytest

from rapshee_engine.errors import WeightFileError
from rapshee_engine.weights.json_object import parse_json_object, read_json_object


def test_reads_an_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, null], "é": {"b": true}}', encoding="utf-8")
    assert read_json_object(path) == {"a": [1, 2.5, None], "é": {"b": True}}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is listed twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_refuses(data: bytes, reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason) as caught:
        parse_json_object("some.json", data)
    assert caught.value.file == "some.json"


def test_missing_file_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match="cannot be read"):
        read_json_object(tmp_path / "absent.json")


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as stream:
        stream.truncate((16 << 20) + 1)
    with pytest.raises(WeightFileError, match="larger than 16 MiB"):
        read_json_object(path)
