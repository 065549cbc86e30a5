"""The strings of a vocabulary that control the model, and where a text holds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import tokenizers

from rapshee_engine.errors import UnsupportedModelError

__all__ = ["ControlTokens"]


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
        self.ids = {token.content: token_id for token_id, token in tokens.items()}
        self.unknown_id = self.ids.get(unknown) if unknown is not None else None
        self._flags = {token.content: token for token in tokens.values()}
        longest_first = sorted(self.ids, key=lambda string: (-len(string), string))
        # "(?!)" matches nothing: a vocabulary may have no control tokens.
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        stripped = [string.strip() for string in self.ids]
        self.edges = _cases(char for string in stripped for char in (string[:1], string[-1:]))

    def split(self, text: str) -> list[str]:
        """``[text, token, text, ..., token, text]``: leftmost match first, longest first."""
        return self._pattern.split(text)

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
        text = text.lower()
        for string in map(str.lower, self.ids):
            if string in text:
                return True
            for size in range(1, min(len(string), len(text) + 1)):
                if text.endswith(string[:size]) or text.startswith(string[-size:]):
                    return True
        return False


def _cases(chars: Iterable[str]) -> frozenset[str]:
    return frozenset(
        case for char in chars for case in (char, char.lower(), char.upper()) if len(case) == 1
    )
