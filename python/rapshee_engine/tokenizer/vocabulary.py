"""What a `Tokenizer` needs of a vocabulary, and the one that the `tokenizers` library reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import tokenizers

from rapshee_engine.errors import InvalidRequestError
from rapshee_engine.tokenizer.library_checks import library_errors
from rapshee_engine.tokenizer.token_text import TokenScheme, token_scheme

__all__ = ["LibraryVocabulary", "Vocabulary"]


class Vocabulary(Protocol):
    """Tokens and the rules by which text becomes tokens. Immutable; safe to use from threads.

    Attributes:
        size: one more than the largest token id; 0 without tokens.
        special: id -> control token, with the rules by which it is found in a text.
        unknown: string of the token for characters outside the vocabulary, if there is one.
        scheme: what tokens are in text.
    """

    @property
    def size(self) -> int: ...

    @property
    def special(self) -> Mapping[int, tokenizers.AddedToken]: ...

    @property
    def unknown(self) -> str | None: ...

    @property
    def scheme(self) -> TokenScheme: ...

    def token(self, token_id: int) -> str | None:
        """The token's string; None for an id without a token."""

    def token_id(self, token: str) -> int | None:
        """The id of a string; None where it is no token."""

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """Token ids of a text without lone surrogates. Arguments as in `Tokenizer.encode`."""

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of plain text that follows other text: nothing is added at its start."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens; bytes that are no UTF-8 become U+FFFD."""


class LibraryVocabulary:
    """A vocabulary that the `tokenizers` library encodes and decodes."""

    def __init__(self, hf_tokenizer: tokenizers.Tokenizer, source: str) -> None:
        """Wrap ``hf_tokenizer``, which nobody else may change from now on.

        Raises:
            UnsupportedModelError: its decoder is unknown.
        """
        hf_tokenizer.no_truncation()
        hf_tokenizer.no_padding()
        self._hf = hf_tokenizer
        decoder = hf_tokenizer.decoder
        self.scheme = token_scheme(
            None if decoder is None else json.loads(decoder.__getstate__()), source
        )
        self.size = 1 + max(hf_tokenizer.get_vocab().values(), default=-1)
        added = hf_tokenizer.get_added_tokens_decoder()
        self.special = {token_id: token for token_id, token in added.items() if token.special}
        self.unknown: str | None = getattr(hf_tokenizer.model, "unk_token", None)

    def token(self, token_id: int) -> str | None:
        return self._hf.id_to_token(token_id) if 0 <= token_id < self.size else None

    def token_id(self, token: str) -> int | None:
        return self._hf.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        hf = self._hf if parse_special else self._plain
        with library_errors(InvalidRequestError("the tokenizer fails on this text")):
            return hf.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_continuation(self, text: str) -> list[int]:
        with library_errors(InvalidRequestError("the tokenizer fails on this text")):
            return self._plain_continuation.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self._hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # Special matching is a switch on the shared object, so the second mode is a second object,
        # made when it is first needed.
        plain = tokenizers.Tokenizer.from_str(self._hf.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _plain_continuation(self) -> tokenizers.Tokenizer:
        rules = self._hf.to_str()
        inner = rules.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        if inner == rules:
            return self._plain
        continuation = tokenizers.Tokenizer.from_str(inner)
        continuation.encode_special_tokens = True
        return continuation
