"""Text of one completion, token by token, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from rapshee_engine.tokenizer.stop_strings import StopStrings
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Turns the tokens of one completion into text.

    All pushes and `finish` together give what `Tokenizer.decode` gives for all tokens, cut at the
    first stop string. The cost of a token does not depend on the length of the text.

    Args:
        stop: strings that end the text.
        include_stop_str_in_output: keep the stop string at the end of the text.
        skip_special_tokens: leave control tokens out.
        after: the tokens that the completion's text continues.

    Attributes:
        stopped_by: the stop string that ended the text, or None; later tokens are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        after: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.text_stream(after=after)
        self._stops = StopStrings(stop) if stop else None
        self._include_stop = include_stop_str_in_output
        self._skip_special = skip_special_tokens
        self.stopped_by: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """New text that is certain: no half characters, nothing that may begin a stop string."""
        new = []
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            if self._skip_special and self._tokenizer.is_special(token_id):
                continue
            token = self._tokenizer.token_text(token_id)
            if token is not None:
                new.append(self._cut(self._stream.push(token)))
        return "".join(new)

    def finish(self) -> str:
        """What was held back, at the end of the completion. It too may hold a stop string."""
        if self.stopped_by is not None:
            return ""
        rest = self._cut(self._stream.finish())
        if self._stops is not None and self.stopped_by is None:
            rest += self._stops.flush()
        return rest

    def _cut(self, text: str) -> str:
        if self._stops is None:
            return text
        text = self._stops.push(text)
        self.stopped_by = self._stops.matched
        if self.stopped_by is not None and self._include_stop:
            text += self.stopped_by
        return text
