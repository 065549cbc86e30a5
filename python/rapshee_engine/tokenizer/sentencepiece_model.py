"""A sentencepiece model: what its file says, checked, and a processor of the library for it.

The library never sees a file: a file is read here, and what it says is written anew after it was
checked, so that an error names the piece, and native code meets no surprises. Field numbers are
those of ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from sentencepiece import SentencePieceProcessor

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.tokenizer.charsmap import charsmap_error

__all__ = ["PieceKind", "SentencePieceModel", "read_sentencepiece"]

_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "char"}

# Four times the largest vocabulary.
_MAX_PIECES = 1 << 20
# A file's messages: itself and its settings, which may list special pieces; one piece, which has 3.
_MAX_FIELDS = _MAX_PIECES + 1024
_MAX_PIECE_FIELDS = 8
_MAX_PIECE_CHARS = 1 << 10
# Beyond any score of a real vocabulary, and sums over a text stay finite.
_MAX_SCORE = 1e12

_FLOAT = struct.Struct("<f")
_BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))


class PieceKind(IntEnum):
    """What a piece is; the numbers are also those of ``tokenizer.ggml.token_type`` in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A model; it may be wrong until `processor` has made something of it.

    Attributes:
        pieces: string of each id.
        scores: of each id; the higher the earlier a merge, or the likelier the piece.
        kinds: `PieceKind` of each id.
        model_type: 1 is unigram, 2 is BPE.
        byte_fallback: characters without a piece become byte pieces.
        add_dummy_prefix: a text gets a space at its start.
        remove_extra_whitespaces: spaces at both ends and all but one of a run are dropped.
        charsmap: the precompiled map of characters that is applied first; empty for none.
        bos_piece, eos_piece: control tokens; None where the model has none.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    model_type: int = _BPE
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    bos_piece: str | None = None
    eos_piece: str | None = None

    def processor(self, source: str) -> SentencePieceProcessor:
        """The library's processor.

        Raises:
            WeightFileError: the model is not consistent; ``source`` is the file at fault.
            UnsupportedModelError: its type is not implemented.
        """
        self._check(source)
        try:
            return SentencePieceProcessor(model_proto=self._to_bytes())
        except RuntimeError as error:
            raise WeightFileError(source, f"sentencepiece model: {error}") from None

    def with_dummy_prefix(self, add: bool) -> SentencePieceModel:
        return replace(self, add_dummy_prefix=add)

    def _check(self, source: str) -> None:
        if self.model_type not in (_UNIGRAM, _BPE):
            kind = _MODEL_TYPES.get(self.model_type, self.model_type)
            raise UnsupportedModelError(
                f"{source}: sentencepiece model_type {kind!r} is not supported; "
                "supported: BPE, unigram"
            )
        for reason in self._errors():
            raise WeightFileError(source, reason)

    def _errors(self) -> Iterator[str]:
        """What is wrong, as far as one can go on looking."""
        if not 0 < len(self.pieces) <= _MAX_PIECES:
            yield f"{len(self.pieces)} pieces (1 to {_MAX_PIECES})"
        # A vocabulary has 10^5 pieces, hence the bare loops.
        for index, piece in enumerate(self.pieces):
            if not 0 < len(piece) <= _MAX_PIECE_CHARS or "\0" in piece:
                yield (
                    f"piece {index} is {piece[:20]!r}, {len(piece)} characters long "
                    f"(1 to {_MAX_PIECE_CHARS}, none of them NUL)"
                )
        for index, score in enumerate(self.scores):
            if not -_MAX_SCORE <= score <= _MAX_SCORE:
                yield f"score of piece {index} ({self.pieces[index]!r}) is {score}"
        for index, kind in enumerate(self.kinds):
            if not 1 <= kind <= 6:
                yield f"type of piece {index} ({self.pieces[index]!r}) is {kind} (1 to 6)"
        yield from self._vocabulary_errors()
        if self.charsmap and (error := charsmap_error(self.charsmap)):
            yield f"precompiled_charsmap: {error}"

    def _vocabulary_errors(self) -> Iterator[str]:
        if len(set(self.pieces)) != len(self.pieces):
            piece, count = Counter(self.pieces).most_common(1)[0]
            yield f"piece {piece!r} occurs {count} times"
        unknown = [i for i, kind in enumerate(self.kinds) if kind == PieceKind.UNKNOWN]
        if len(unknown) != 1:
            yield f"{len(unknown)} pieces for unknown characters, expected one"
        found = {
            p for p, kind in zip(self.pieces, self.kinds, strict=True) if kind == PieceKind.BYTE
        }
        if self.byte_fallback and found != set(_BYTE_PIECES):
            yield f"{len(found)} byte pieces, expected <0x00> to <0xFF>"
        if not self.byte_fallback and found:
            yield "byte pieces without byte_fallback"

    def _to_bytes(self) -> bytes:
        scores = struct.pack(f"<{len(self.scores)}f", *self.scores)
        out = []
        for i, (piece, kind) in enumerate(zip(self.pieces, self.kinds, strict=True)):
            text = piece.encode()
            size = _LENGTHS[len(text)]
            body = b"\x0a%b%b\x15%b\x18%c" % (size, text, scores[4 * i : 4 * i + 4], kind)
            out.append(b"\x0a%b%b" % (_LENGTHS[len(body)], body))
        unknown = self.kinds.index(PieceKind.UNKNOWN)
        trainer = [(3, self.model_type), (35, self.byte_fallback), (40, unknown)]
        out.append(_message(2, trainer, [(45, self.pieces[unknown].encode())]))
        normalizer = [(3, self.add_dummy_prefix), (4, self.remove_extra_whitespaces), (5, True)]
        out.append(_message(3, normalizer, [(1, b"identity"), (2, self.charsmap)]))
        return b"".join(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# Of a piece and of its message, which adds less than 16 bytes to it.
_LENGTHS = tuple(_varint(size) for size in range(4 * _MAX_PIECE_CHARS + 16))


def _message(
    field: int, numbers: Iterable[tuple[int, int]], strings: Iterable[tuple[int, bytes]]
) -> bytes:
    body = b"".join(_varint(key << 3) + _varint(value) for key, value in numbers)
    body += b"".join(_varint(key << 3 | 2) + _varint(len(text)) + text for key, text in strings)
    return _varint(field << 3 | 2) + _varint(len(body)) + body


class _BrokenMessageError(Exception):
    """The bytes are no message."""


def _fields(data: memoryview, most: int) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: an integer, or the bytes of a string, message or float."""
    position, size = 0, len(data)
    while position < size:
        most -= 1
        if most < 0:
            raise _BrokenMessageError("a message has too many fields")
        key, position = _read_varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _read_varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            length, position = _read_varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _BrokenMessageError(f"a field of wire type {wire}")
        if length > size - position:
            raise _BrokenMessageError("it is truncated")
        yield key >> 3, data[position : position + length]
        position += length


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    if position < len(data) and data[position] < 0x80:  # most numbers
        return data[position], position + 1
    value = shift = 0
    for byte in data[position : position + 10]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _BrokenMessageError("a number has no end")


def read_sentencepiece(data: bytes, source: str) -> SentencePieceModel:
    """What a ``tokenizer.model`` says. The vocabulary is checked by `SentencePieceModel.processor`.

    Raises:
        WeightFileError: it is no sentencepiece model; ``source`` is the file's name.
        UnsupportedModelError: a setting that is not implemented.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | memoryview] = {}
    normalizer: dict[int, int | memoryview] = {}
    try:
        for field, value in _fields(memoryview(data), _MAX_FIELDS):
            if field == 1:
                pieces.append(_piece(_bytes(value), len(pieces)))
            elif field == 2:
                trainer.update(_fields(_bytes(value), _MAX_FIELDS))
            elif field == 3:
                normalizer.update(_fields(_bytes(value), _MAX_FIELDS))
        return _model(pieces, trainer, normalizer, source)
    except _BrokenMessageError as error:
        raise WeightFileError(source, f"not a readable sentencepiece model: {error}") from None


def _piece(data: memoryview, index: int) -> tuple[str, float, int]:
    # As the library writes it: string, score and, unless it is normal, type. 10^5 pieces are like
    # this; the other way round is for any order, and for strings of 128 bytes and more.
    end = data[1] + 2 if len(data) > 1 and data[0] == 0x0A and data[1] < 0x80 else len(data)
    rest = len(data) - end
    if rest in (5, 7) and data[end] == 0x15:
        kind: int = PieceKind.NORMAL
        if rest == 7:
            kind = data[end + 6] if data[end + 5] == 0x18 else 0x80
        if kind < 0x80:
            score = _FLOAT.unpack_from(data, end + 1)[0]
            return _string(data[2:end], f"piece {index}"), score, kind
    return _piece_of_any_order(data, index)


def _piece_of_any_order(data: memoryview, index: int) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, int(PieceKind.NORMAL)
    for field, value in _fields(data, _MAX_PIECE_FIELDS):
        if field == 1:
            text = _string(value, f"piece {index}")
        elif field == 2 and isinstance(value, memoryview) and len(value) == 4:
            score = _FLOAT.unpack(value)[0]
        elif field == 3:
            kind = _number(value)
    return text, score, kind


def _model(
    pieces: Sequence[tuple[str, float, int]],
    trainer: dict[int, int | memoryview],
    normalizer: dict[int, int | memoryview],
    source: str,
) -> SentencePieceModel:
    if not pieces:
        raise _BrokenMessageError("it has no pieces")
    if _number(trainer.get(24, 0)):
        raise UnsupportedModelError(f"{source}: treat_whitespace_as_suffix is not supported")
    if not _number(normalizer.get(5, 1)):
        raise UnsupportedModelError(f"{source}: escape_whitespaces=false is not supported")
    strings, scores, kinds = zip(*pieces, strict=True)
    return SentencePieceModel(
        pieces=strings,
        scores=scores,
        kinds=kinds,
        model_type=_number(trainer.get(3, _UNIGRAM)),
        byte_fallback=bool(_number(trainer.get(35, 0))),
        add_dummy_prefix=bool(_number(normalizer.get(3, 1))),
        remove_extra_whitespaces=bool(_number(normalizer.get(4, 1))),
        charsmap=bytes(_bytes(normalizer.get(2, memoryview(b"")))),
        bos_piece=_control_piece(trainer, 41, 46, "<s>"),
        eos_piece=_control_piece(trainer, 42, 47, "</s>"),
    )


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _BrokenMessageError("a number is a string")
    return value


def _control_piece(
    trainer: dict[int, int | memoryview], id_field: int, piece_field: int, default: str
) -> str | None:
    """The piece, unless its id is negative: the model has none."""
    if _number(trainer.get(id_field, 0)) >> 63:
        return None
    piece = trainer.get(piece_field)
    return default if piece is None else _string(piece, f"field {piece_field} of trainer_spec")


def _string(value: int | memoryview, what: str) -> str:
    try:
        return str(_bytes(value), "utf-8")
    except UnicodeDecodeError:
        raise _BrokenMessageError(f"{what} is not UTF-8") from None


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _BrokenMessageError("a string is a number")
    return value
