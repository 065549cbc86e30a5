"""The ``tokenizer.ggml.*`` entries of a GGUF file, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rapshee_engine.errors import WeightFileError
from rapshee_engine.files import short_repr
from rapshee_engine.tokenizer.sentencepiece_model import PieceKind

__all__ = ["VocabularyFields"]

_PREFIX = "tokenizer.ggml."


class VocabularyFields:
    """Typed access to the entries. Every method raises `WeightFileError`, which names the entry.

    Attributes:
        source: the file's name.
        tokens: string of each id.
        types: `PieceKind` of each id.
    """

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._metadata = metadata
        self.tokens = self.strings("tokens")
        self.types = self._types()

    def error(self, key: str, reason: str) -> WeightFileError:
        return WeightFileError(self.source, f"{_PREFIX}{key} {reason}")

    def strings(self, key: str) -> Sequence[str]:
        """A list of strings, not empty."""
        values = self._metadata.get(_PREFIX + key)
        if not isinstance(values, list) or not values:
            raise self.error(key, "is missing or empty")
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "must be a list of strings")
        return values

    def scores(self) -> Sequence[float]:
        """A number for each token."""
        values = self._metadata.get(_PREFIX + "scores")
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise self.error("scores", f"must be a list of {len(self.tokens)} numbers")
        if not all(type(value) in (int, float) for value in values):
            raise self.error("scores", "must be a list of numbers")
        return values

    def octets(self, key: str) -> bytes:
        """A list of bytes, signed or not; empty if it is missing."""
        values = self._metadata.get(_PREFIX + key, [])
        if not isinstance(values, list) or not all(
            type(value) is int and -128 <= value < 256 for value in values
        ):
            raise self.error(key, "must be a list of bytes")
        return bytes(value & 0xFF for value in values)

    def token_id(self, key: str, default: int | None = None) -> int | None:
        """The id of a token; where there is no entry, ``default`` if there is such a token."""
        token_id = self._metadata.get(_PREFIX + key)
        if token_id is None:
            return default if default is None or default < len(self.tokens) else None
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            raise self.error(
                key, f"is {short_repr(token_id)}; the vocabulary has {len(self.tokens)} tokens"
            )
        return token_id

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(_PREFIX + key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {short_repr(value)}, not a boolean")
        return value

    def _types(self) -> Sequence[int]:
        count = len(self.tokens)
        types = self._metadata.get(_PREFIX + "token_type", [int(PieceKind.NORMAL)] * count)
        if not isinstance(types, list) or len(types) != count:
            raise self.error("token_type", f"must be a list of {count} types")
        for token_id, kind in enumerate(types):
            if type(kind) is not int or not PieceKind.NORMAL <= kind <= PieceKind.BYTE:
                raise self.error(
                    "token_type", f"of token {token_id} is {short_repr(kind)} (1 to 6)"
                )
        return types
