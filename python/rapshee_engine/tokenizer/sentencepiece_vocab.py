"""A sentencepiece model with its added tokens, as a `Vocabulary`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cached_property

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from rapshee_engine.errors import WeightFileError
from rapshee_engine.tokenizer.added_tokens import AddedTokens
from rapshee_engine.tokenizer.sentencepiece_model import PieceKind, SentencePieceModel
from rapshee_engine.tokenizer.token_text import ByteFallbackScheme

__all__ = ["DummyPrefix", "SentencePieceVocabulary"]

_SPACE = "\u2581"

# Ids are indices into tables; no vocabulary comes near this one.
_MAX_TOKENS = 1 << 22


class DummyPrefix(Enum):
    """Where a space is put before text, so that a word is the same at the start and inside.

    EACH: before every text that follows an added token or nothing: sentencepiece's own rule, that
    of llama.cpp, and that of `transformers` with ``legacy``.
    FIRST: only at the start of all, and not where there is a space already: without ``legacy``.
    """

    NEVER = "never"
    FIRST = "first"
    EACH = "each"


class SentencePieceVocabulary:
    """Encodes with the `sentencepiece` library, decodes as `transformers` does."""

    def __init__(
        self,
        model: SentencePieceModel,
        added: Mapping[int, AddedToken],
        *,
        prefix: DummyPrefix,
        first: Sequence[int] = (),
        last: Sequence[int] = (),
        source: str,
    ) -> None:
        """
        Args:
            added: tokens found in a text before the model sees it; an id may be one of the model's
                pieces, or lie beyond them.
            first, last: ids put around a text on demand.
            source: the file's name, for messages.

        Raises:
            WeightFileError: model or added tokens are not consistent.
            UnsupportedModelError: the model's type is not implemented.
        """
        self._processor = model.with_dummy_prefix(False).processor(source)
        _check_added(model, added, source)
        self._model = model
        self._source = source
        self._prefix = prefix
        self._first, self._last = list(first), list(last)
        self._tokens = {**dict(enumerate(model.pieces)), **{i: t.content for i, t in added.items()}}
        self._ids = {token: token_id for token_id, token in self._tokens.items()}
        self._added = AddedTokens(added)
        self.size = 1 + max(self._tokens)
        self.special = {token_id: token for token_id, token in added.items() if token.special}
        self.unknown: str | None = self._tokens[model.kinds.index(PieceKind.UNKNOWN)]
        self.scheme = ByteFallbackScheme(
            [(_SPACE, " ")],
            has_bytes=model.byte_fallback,
            strip=("", 0) if prefix is DummyPrefix.NEVER else (" ", 1),
        )

    def token(self, token_id: int) -> str | None:
        return self._tokens.get(token_id)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        ids = self._encode(text, parse_special=parse_special, at_start=True)
        return [*self._first, *ids, *self._last] if add_special_tokens else ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode(text, parse_special=False, at_start=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        stream = self.scheme.stream()
        text = []
        for token_id in token_ids:
            token = self._tokens.get(token_id)
            if token is not None and not (skip_special_tokens and token_id in self.special):
                text.append(stream.push(self.scheme.token_text(token)))
        return "".join([*text, stream.finish()])

    def _encode(self, text: str, *, parse_special: bool, at_start: bool) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._added.split(text, parse_special=parse_special)):
            if isinstance(part, int):
                ids.append(part)
            elif self._wants_prefix(part, at_start=at_start and index == 0):
                ids += self._encode_prefixed(part)
            else:
                ids += self._processor.encode(part)
        return ids

    def _wants_prefix(self, text: str, *, at_start: bool) -> bool:
        if self._prefix is DummyPrefix.FIRST:
            spaces = _SPACE if self._model.remove_extra_whitespaces else (_SPACE, " ")
            return at_start and not text.startswith(spaces)
        return self._prefix is DummyPrefix.EACH

    def _encode_prefixed(self, text: str) -> list[int]:
        # A space at the start is the prefix, unless the model drops spaces there.
        if self._model.remove_extra_whitespaces:
            return list(self._prefixing_processor.encode(text))
        return list(self._processor.encode(" " + text))

    @cached_property
    def _prefixing_processor(self) -> SentencePieceProcessor:
        return self._model.with_dummy_prefix(True).processor(self._source)


def _check_added(model: SentencePieceModel, added: Mapping[int, AddedToken], source: str) -> None:
    ids = {piece: i for i, piece in enumerate(model.pieces) if i not in added}
    for token_id, token in added.items():
        if not 0 <= token_id < _MAX_TOKENS:
            raise WeightFileError(
                source, f"added token {token.content!r} has id {token_id} (0 to {_MAX_TOKENS - 1})"
            )
        if not token.content:
            raise WeightFileError(source, f"added token {token_id} is empty")
        other = ids.setdefault(token.content, token_id)
        if other != token_id:
            raise WeightFileError(
                source, f"added token {token.content!r} has id {token_id}, and also id {other}"
            )
