"""Files that are models, and files that are not."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from rapshee_engine.errors import RapsheeError, UnsupportedModelError, WeightFileError
from rapshee_engine.tokenizer.sentencepiece_model import (
    PieceKind,
    SentencePieceModel,
    read_sentencepiece,
)

FOLDERS = Path(__file__).parent.parent / "golden" / "tokenizers"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def data(name: str = "llama") -> bytes:
    return (FOLDERS / name / "tokenizer.model").read_bytes()


@pytest.fixture
def model() -> SentencePieceModel:
    return read_sentencepiece(data(), "file")


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


PIECES = field(1, field(1, b"<unk>") + field(3, 2)) + field(1, field(1, b"a"))


def test_a_model_and_its_settings(model: SentencePieceModel) -> None:
    assert model.pieces[:4] == ("<unk>", "<s>", "</s>", "<0x00>")
    assert model.kinds[:4] == (PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.CONTROL, 6)
    assert (model.model_type, model.byte_fallback, model.add_dummy_prefix) == (2, True, True)
    assert (model.remove_extra_whitespaces, model.charsmap) == (False, b"")
    assert (model.bos_piece, model.eos_piece) == ("<s>", "</s>")
    gemma = read_sentencepiece(data("gemma"), "file")
    assert (gemma.bos_piece, gemma.eos_piece, gemma.add_dummy_prefix) == ("<bos>", "<eos>", False)
    assert read_sentencepiece(data("unigram"), "file").charsmap


def test_defaults_are_those_of_the_format() -> None:
    model = read_sentencepiece(PIECES, "file")
    assert (model.model_type, model.byte_fallback) == (1, False)
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces) == (True, True)
    assert (model.bos_piece, model.eos_piece) == ("<s>", "</s>")
    assert model.processor("file").encode("a") == [0, 1]  # the prefix is unknown


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (field(1, b"a") + b"\x15\0\0\x80\x3f", ("a", 1.0, 1)),
        (field(1, b"a") + b"\x15\0\0\x80\x3f" + field(3, 4), ("a", 1.0, 4)),
        (b"\x15\0\0\x80\x3f" + field(3, 4) + field(1, b"a"), ("a", 1.0, 4)),
        (field(1, b"a") + b"\x15\0\0\x80\x3f" + field(4, 4), ("a", 1.0, 1)),
        (field(1, b"a" * 300) + b"\x15\0\0\x80\x3f", ("a" * 300, 1.0, 1)),
        (field(3, 5), ("", 0.0, 5)),
    ],
)
def test_fields_of_a_piece_come_in_any_order(
    message: bytes, expected: tuple[str, float, int]
) -> None:
    model = read_sentencepiece(field(1, message), "file")
    assert (model.pieces[0], model.scores[0], model.kinds[0]) == expected


def test_negative_ids_name_no_token() -> None:
    model = read_sentencepiece(PIECES + field(2, field(41, 2**64 - 1)), "file")
    assert (model.bos_piece, model.eos_piece) == (None, "</s>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no pieces"),
        (b"IQ== 0\nIg== 1\n", "it has no pieces"),
        (b"\x0b", "a field of wire type 3"),
        (b"\x0a", "a number has no end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "a number has no end"),
        (PIECES + b"\x0a\x05ab", "truncated"),
        (PIECES + field(1, field(1, b"a") + b"\x15\0\0"), "truncated"),
        (PIECES + field(1, field(1, b"a") + b"\x15\0\0\0\0\x18\x80"), "no end"),
        (PIECES + field(1, field(3, 1) * 9), "a message has too many fields"),
        (PIECES + field(9, 1) * (2 << 20), "a message has too many fields"),
        (field(1, 5), "a string is a number"),
        (field(1, field(1, b"\xff")), "piece 0 is not UTF-8"),
        (PIECES + field(2, field(3, b"x")), "a number is a string"),
        (PIECES + field(2, field(46, b"\xc3")), "field 46 of trainer_spec is not UTF-8"),
        (PIECES + field(3, field(2, 7)), "a string is a number"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(WeightFileError, match=f"file: not a readable sentencepiece.*{message}"):
        read_sentencepiece(content, "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (field(2, field(24, 1)), "treat_whitespace_as_suffix"),
        (field(3, field(5, 0)), "escape_whitespaces=false"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"file: {message}"):
        read_sentencepiece(PIECES + content, "file")


@pytest.mark.parametrize("kind", [3, 4, 9])
def test_other_types_are_refused(model: SentencePieceModel, kind: int) -> None:
    with pytest.raises(UnsupportedModelError, match="file: sentencepiece model_type"):
        replace(model, model_type=kind).processor("file")


@pytest.mark.parametrize(
    ("index", "piece", "score", "kind", "message"),
    [
        (300, "", 0.0, 1, "piece 300 is '', 0 characters"),
        (300, "x" * 1025, 0.0, 1, "piece 300 is 'x{20}', 1025 characters long"),
        (300, "a\0b", 0.0, 1, "piece 300 is"),
        (300, "new", float("nan"), 1, r"score of piece 300 \('new'\) is nan"),
        (300, "new", float("-inf"), 1, "score of piece 300"),
        (300, "new", 1e30, 1, "score of piece 300"),
        (300, "new", 0.0, 0, r"type of piece 300 \('new'\) is 0"),
        (300, "new", 0.0, 7, "type of piece 300"),
        (300, "<s>", 0.0, 1, "piece '<s>' occurs 2 times"),
        (300, "new", 0.0, 2, "2 pieces for unknown characters"),
        (0, "<unk>", 0.0, 3, "0 pieces for unknown characters"),
        (3, "<0x00>", 0.0, 1, "255 byte pieces"),
        (3, "<0x100>", 0.0, 6, "256 byte pieces, expected <0x00> to <0xFF>"),
    ],
)
def test_inconsistent_pieces_are_refused(
    model: SentencePieceModel, index: int, piece: str, score: float, kind: int, message: str
) -> None:
    pieces, scores, kinds = list(model.pieces), list(model.scores), list(model.kinds)
    pieces[index], scores[index], kinds[index] = piece, score, kind
    broken = replace(model, pieces=pieces, scores=scores, kinds=kinds)
    with pytest.raises(WeightFileError, match=f"file: {message}"):
        broken.processor("file")


def test_bytes_need_byte_fallback(model: SentencePieceModel) -> None:
    with pytest.raises(WeightFileError, match="byte pieces without byte_fallback"):
        replace(model, byte_fallback=False).processor("file")


def test_a_broken_map_is_refused(model: SentencePieceModel) -> None:
    with pytest.raises(WeightFileError, match="file: precompiled_charsmap"):
        replace(model, charsmap=b"\1").processor("file")


def test_the_largest_pieces_are_kept() -> None:
    pieces = ["<unk>", *BYTES, "é" * 1024, "\U0010ffff" * 1024]
    kinds = [2] + [6] * 256 + [1, 1]
    model = SentencePieceModel(
        pieces, [-float(i) for i in range(259)], kinds, add_dummy_prefix=False
    )
    processor = model.processor("file")
    assert [processor.id_to_piece(i) for i in range(259)] == pieces
    assert [processor.get_score(i) for i in range(259)] == list(model.scores)


@pytest.mark.parametrize("name", ["llama", "unigram"])
def test_damaged_files_give_typed_errors(name: str) -> None:
    """Or a model that still encodes: what is wrong with it does no harm."""
    draw = random.Random(1)
    original = data(name)
    refused = 0
    for _ in range(300):
        damaged = bytearray(original)
        for _ in range(draw.choice((1, 2, 8))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            processor = read_sentencepiece(bytes(damaged), "file").processor("file")
        except RapsheeError:
            refused += 1
        else:
            assert all(0 <= i < processor.get_piece_size() for i in processor.encode("The dög \0"))
    assert 0 < refused < 300
