"""Maps of characters that may be followed, and maps that may not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rapshee_engine.tokenizer.charsmap import charsmap_error
from rapshee_engine.tokenizer.sentencepiece_model import read_sentencepiece

MODEL = Path(__file__).parent.parent / "golden" / "tokenizers" / "unigram" / "tokenizer.model"


@pytest.fixture
def charsmap() -> bytes:
    return read_sentencepiece(MODEL.read_bytes(), "file").charsmap


def units(count: int = 256, **changed: int) -> bytes:
    array = [0] * count
    for index, unit in changed.items():
        array[int(index[1:])] = unit
    return struct.pack(f"<{count + 1}I", 4 * count, *array)


def test_a_real_map_is_accepted(charsmap: bytes) -> None:
    assert charsmap_error(charsmap) is None


def test_an_empty_map_is_accepted() -> None:
    assert charsmap_error(units() + b"\0") is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0", "truncated"),
        (units()[:-4] + b"\0", "1024 bytes long, of 1021"),
        (struct.pack("<I", 0) + b"\0", "0 bytes long"),
        (units(255) + b"\0" * 5, "1020 bytes long"),
        (units() + b"a", "no end"),
        (units(), "no end"),
        (units(_7=1 << 18 << 10) + b"\0", "leads out of itself"),
        # A unit at 2 with a leaf at 2 ^ 1 = 3, which says that its text begins at 9.
        (units(_2=1 << 10 | 1 << 8, _3=1 << 31 | 9) + b"a\0", "leads out of its texts"),
    ],
)
def test_dangerous_maps_are_refused(data: bytes, message: str) -> None:
    error = charsmap_error(data)
    assert error is not None
    assert message in error


def test_every_cut_of_a_map_is_refused(charsmap: bytes) -> None:
    size = 4 + int.from_bytes(charsmap[:4], "little")
    assert all(charsmap_error(charsmap[:end]) for end in range(0, size + 1, 97))
