"""The strings of a vocabulary that control the model, and where a text holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import tokenizers

from rapshee_engine.errors import UnsupportedModelError
from rapshee_engine.tokenizer.string_set import StringSet

__all__ = ["ControlTokens"]

_MAX_LENGTH = 128  # characters; the longest of known models have 40


class ControlTokens:
    """The control tokens of one vocabulary.

    Attributes:
        ids: string -> id.
        unknown_id: the token for characters outside the vocabulary, which plain text may give.
        edges: first and last characters of the strings (white space aside), in each case.
    """

    def __init__(
        self, tokens: Mapping[int, tokenizers.AddedToken], *, unknown: str | None = None
    ) -> None:
        """Raises `UnsupportedModelError` if a string is far longer than such strings are."""
        self.ids = {token.content: token_id for token_id, token in tokens.items()}
        self.unknown_id = self.ids.get(unknown) if unknown is not None else None
        self._flags = {token.content: token for token in tokens.values()}
        for string in self.ids:
            if len(string) > _MAX_LENGTH:
                raise UnsupportedModelError(
                    f"control token {string[:20]!r}... is {len(string)} characters long; at most "
                    f"{_MAX_LENGTH} are supported"
                )
        self._strings = StringSet(self.ids)
        self._lower_strings = StringSet(map(str.lower, self.ids))
        stripped = [string.strip() for string in self.ids]
        self.edges = _cases(char for string in stripped for char in (string[:1], string[-1:]))

    def split(self, text: str) -> list[str]:
        """``[text, token, text, ..., token, text]``: leftmost match first, longest first."""
        return self._strings.split(text)

    def lstrip(self, token: str) -> bool:
        """Whether the token swallows white space before it."""
        return bool(self._flags[token].lstrip)

    def rstrip(self, token: str) -> bool:
        """Whether the token swallows white space after it."""
        return bool(self._flags[token].rstrip)

    def require_breakable(self) -> None:
        """Raise `UnsupportedModelError` if a string is too short to be broken in two."""
        for string in self.ids:
            if len(string.strip()) < 2:
                raise UnsupportedModelError(
                    f"control token {string!r} cannot be told apart from text in a chat: "
                    "it is a single character"
                )

    def touches(self, text: str) -> bool:
        """Whether the text holds a control token, starts with the end of one, or ends with the
        beginning of one, whatever the case."""
        return self._lower_strings.touches(text.lower())


def _cases(chars: Iterable[str]) -> frozenset[str]:
    return frozenset(
        case for char in chars for case in (char, char.lower(), char.upper()) if len(case) == 1
    )
