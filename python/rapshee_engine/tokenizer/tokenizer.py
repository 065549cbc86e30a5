"""Token ids of a text and text of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import tokenizers

from rapshee_engine.errors import InvalidRequestError
from rapshee_engine.tokenizer.control_tokens import ControlTokens
from rapshee_engine.tokenizer.token_text import TextStream, TokenText
from rapshee_engine.tokenizer.vocabulary import LibraryVocabulary, Vocabulary

__all__ = ["Tokenizer", "reject_lone_surrogates"]


def reject_lone_surrogates(text: str, param: str | None) -> None:
    """Raise `InvalidRequestError` if the text has no UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}; it is not valid Unicode",
            param=param,
        ) from None


class Tokenizer:
    """A vocabulary with its rules. Immutable, and safe to use from several threads.

    Attributes:
        vocab_size: one more than the largest token id; 0 for one `without_vocabulary`.
        bos_token, eos_token: strings of these control tokens, as chat templates want them.
        eos_token_ids: ids that end a completion.
        control_tokens: strings that are control tokens, with their ids.
        control: the same, with what finds them in a text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self._token_texts: dict[int, TokenText] = {}
        self.vocab_size = vocabulary.size
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_token_id = None if bos_token is None else vocabulary.token_id(bos_token)
        self.eos_token_ids = frozenset(eos_token_ids)
        self._special = {i: token.content for i, token in vocabulary.special.items()}
        self.control = ControlTokens(vocabulary.special, unknown=vocabulary.unknown)
        self.control_tokens: Mapping[str, int] = MappingProxyType(self.control.ids)

    @classmethod
    def without_vocabulary(cls) -> Tokenizer:
        """The tokenizer of a model that only takes token ids: no token has a text, and text is
        refused."""
        empty = tokenizers.Tokenizer(tokenizers.models.BPE())
        empty.decoder = tokenizers.decoders.ByteLevel()
        return cls(LibraryVocabulary(empty, "no vocabulary"))

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of ``text``.

        Args:
            add_special_tokens: add what the model wants around a text, such as its first token.
            parse_special: strings of control tokens in the text become control tokens; otherwise
                they are plain text.

        Raises:
            InvalidRequestError: the text has lone surrogates, or there is no vocabulary.
        """
        self.require_vocabulary("a text", "prompt")
        reject_lone_surrogates(text, None)
        return self._vocabulary.encode(
            text, add_special_tokens=add_special_tokens, parse_special=parse_special
        )

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that follows other text: no control tokens, nothing added around it, no
        space put before it that the tokenizer puts only at the start of a text."""
        return self._vocabulary.encode_continuation(text)

    def require_vocabulary(self, what: str, param: str) -> None:
        """Raise `InvalidRequestError`, which names the field ``param``, if there are no tokens for
        ``what``."""
        if not self.vocab_size:
            raise InvalidRequestError(
                f"this model was loaded without a tokenizer: it takes prompt_token_ids, not {what}",
                param=param,
            )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._vocabulary.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's exact bytes in text, those of its string for a control token; empty for an id
        without a token."""
        if token_id in self._special:
            return self._special[token_id].encode()
        text = self.token_text(token_id)
        return b"" if text is None else text.data

    def token_text(self, token_id: int) -> TokenText | None:
        """The token in text; None for an id without a token."""
        text = self._token_texts.get(token_id)
        if text is None:
            token = self._vocabulary.token(token_id)
            if token is None:
                return None
            text = self._token_texts[token_id] = self._vocabulary.scheme.token_text(token)
        return text

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token."""
        return token_id in self._special

    def text_stream(self, *, after: Sequence[int] = ()) -> TextStream:
        """A decoder for one sequence; feed it `token_text`. ``after``: the tokens before it in the
        same text; where any of them is text, the sequence keeps the space that the start of a text
        loses."""
        continues = any(token_id not in self._special for token_id in after)
        return self._vocabulary.scheme.stream(continues=continues)
