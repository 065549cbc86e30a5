"""Log-probabilities in the form that text completions have."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, field

from rapshee_engine.engine.outputs import Logprob, TokenLogprobs
from rapshee_engine.server.answers import json_logprob
from rapshee_engine.tokenizer.token_text import TokenText
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["LegacyLogprobs", "TextPositions", "token_string"]


class LegacyLogprobs(Struct):
    """Four lists with one entry a token.

    Attributes:
        token_logprobs, top_logprobs: null for the first token of a prompt, which nothing predicts.
        top_logprobs: token -> log-probability of the likeliest and of the token itself, best first.
        text_offset: where the token begins in the choice's text, in characters.
    """

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, position: TokenLogprobs, offset: int) -> None:
        entries = list(position.values())
        self.tokens.append(_entry_string(entries[0]))
        self.token_logprobs.append(json_logprob(entries[0]))
        top: dict[str, float] = {}
        for entry in sorted(entries, key=lambda entry: entry.rank):
            top.setdefault(_entry_string(entry), json_logprob(entry))
        self.top_logprobs.append(top)
        self.text_offset.append(offset)

    def add_unpredicted(self, token: str, offset: int) -> None:
        self.tokens.append(token)
        self.token_logprobs.append(None)
        self.top_logprobs.append(None)
        self.text_offset.append(offset)

    def copy(self) -> LegacyLogprobs:
        return LegacyLogprobs(
            self.tokens.copy(),
            self.token_logprobs.copy(),
            self.top_logprobs.copy(),
            self.text_offset.copy(),
        )


class TextPositions:
    """Where each token of a sequence begins in its text.

    A token that begins inside a character, or a control token that is not shown, has the position
    of what follows it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        start: int = 0,
        after: Sequence[int] = (),
        show_control: bool = False,
    ) -> None:
        """``start``: position of the first token; ``after``: the tokens that it follows."""
        self._tokenizer = tokenizer
        self._stream = tokenizer.text_stream(after=after)
        self._length = start
        self._show_control = show_control

    def push(self, token_id: int) -> tuple[int, str]:
        """Position of the next token, in characters, and the text that is certain with it."""
        before = self._length
        token = self._token_text(token_id)
        if token is None:
            return before, ""
        text = self._stream.push(token)
        self._length += len(text)
        # The text may begin with what earlier tokens held back.
        own_length = len(token.data.decode("utf-8", "replace"))
        return max(before, self._length - own_length), text

    def finish(self) -> str:
        """The text that was held back."""
        return self._stream.finish()

    def _token_text(self, token_id: int) -> TokenText | None:
        if not self._tokenizer.is_special(token_id):
            return self._tokenizer.token_text(token_id)
        return TokenText(self._tokenizer.token_bytes(token_id)) if self._show_control else None


def token_string(token_bytes: bytes) -> str:
    """A token as JSON shows it: its text, or ``bytes:\\xe2\\x80`` for a part of a character."""
    try:
        return token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _entry_string(entry: Logprob) -> str:
    return token_string(entry.token_bytes)
