"""Finds added tokens in a text, by the rules of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import tokenizers
from tokenizers import AddedToken, models

__all__ = ["AddedTokens"]


class AddedTokens:
    """The added tokens of one vocabulary: control tokens, and others that are found in a text
    before it is cut into pieces. Immutable, and safe to use from several threads.

    The work is done by a `tokenizers` tokenizer of which everything between two added tokens is one
    unknown token.
    """

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        """``tokens`` maps ids to tokens, whose strings differ."""
        rest = "x" * (1 + max((len(token.content) for token in tokens.values()), default=0))
        self._splitter = tokenizers.Tokenizer(models.WordLevel({rest: 0}, unk_token=rest))
        self._splitter.add_tokens(list(tokens.values()))
        # The library numbers its tokens itself.
        own_ids = self._splitter.get_added_tokens_decoder()
        ids = {token.content: token_id for token_id, token in tokens.items()}
        self._ids = {own_id: ids[token.content] for own_id, token in own_ids.items()}

    def split(self, text: str, *, parse_special: bool) -> Iterator[int | str]:
        """Ids of the added tokens in ``text`` and, never empty, the text between them.

        Args:
            parse_special: otherwise strings of control tokens are part of the text.
        """
        splitter = self._splitter if parse_special else self._without_special
        found = splitter.encode(text, add_special_tokens=False)
        for own_id, (start, end) in zip(found.ids, found.offsets, strict=True):
            yield self._ids.get(own_id, text[start:end])

    @cached_property
    def _without_special(self) -> tokenizers.Tokenizer:
        splitter = tokenizers.Tokenizer.from_str(self._splitter.to_str())
        splitter.encode_special_tokens = True
        return splitter
