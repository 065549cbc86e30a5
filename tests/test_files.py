"""What comes from a checkpoint's small files, and how they are opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine.errors import WeightFileError
from rapshee_engine.files import (
    open_regular,
    parse_json_object,
    read_file,
    read_json_object,
    read_optional_json_object,
    short_repr,
)


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
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\udc00": 1}', "surrogates not allowed"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
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


def test_pairs_of_surrogates_are_a_character() -> None:
    assert parse_json_object("some.json", b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_absent_and_broken_are_not_the_same(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert read_optional_json_object(path) == {}
    path.mkdir()
    with pytest.raises(WeightFileError, match="not a regular file"):
        read_optional_json_object(path)
    with pytest.raises(WeightFileError, match="cannot be read"):
        read_optional_json_object(tmp_path / ("x" * 300))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(WeightFileError, match="not a regular file"):
            open_regular(path)
    for name in ("absent", "zero\0byte", "x" * 300):
        with pytest.raises(WeightFileError, match="cannot be read"):
            open_regular(tmp_path / name)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(Path("..") / "blob")
    assert read_file(tmp_path / "folder" / "link", 7) == b"content"
    with pytest.raises(WeightFileError, match="larger than"):
        read_file(tmp_path / "folder" / "link", 6)


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for size in (4, 9):
        path.write_bytes(b"content")
        before = open_regular(path)
        os.truncate(path, size)
        monkeypatch.setattr("rapshee_engine.files.open_regular", lambda _, opened=before: opened)
        with pytest.raises(WeightFileError, match="changed while it was read"):
            read_file(path, 100)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [[0] * 10**6, "x" * 10**6, {str(i): i for i in range(10**5)}, nested(10**4)]
)
def test_a_value_in_a_message_is_short(value: Any) -> None:
    assert 0 < len(short_repr(value)) <= 400


@pytest.mark.parametrize("value", [1, -2.5, "text", None, [1, "2"], {"a": [True]}])
def test_a_short_value_is_itself(value: Any) -> None:
    assert short_repr(value) == repr(value)
