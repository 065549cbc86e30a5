"""What each token is in text, and how a sequence of tokens becomes text step by step.

Two schemes cover the byte-pair vocabularies of the llama family. Both give exactly what the
decoder of the `tokenizers` library gives for the whole sequence.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rapshee_engine.errors import UnsupportedModelError

__all__ = ["TextStream", "TokenScheme", "TokenText", "token_scheme"]

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token in text.

    Attributes:
        data: its bytes, possibly a part of a character.
        is_byte: it stands for one raw byte (``<0x0A>``) of a run of such tokens.
    """

    data: bytes
    is_byte: bool = False


class TextStream(Protocol):
    """Decodes one sequence token by token. What it returned never changes afterwards."""

    def push(self, token: TokenText) -> str:
        """Text that is certain now."""

    def finish(self) -> str:
        """The rest; incomplete characters as U+FFFD."""


class TokenScheme(Protocol):
    """How token strings of a vocabulary map to text."""

    def token_text(self, token: str) -> TokenText: ...

    def stream(self, *, continues: bool = False) -> TextStream:
        """A decoder; ``continues``: of what follows other text, so that nothing is dropped that
        only the start of a text loses."""


def token_scheme(decoder: Mapping[str, Any] | None, source: str) -> TokenScheme:
    """The scheme of a ``decoder`` entry of a ``tokenizer.json``.

    Raises:
        UnsupportedModelError: an unknown decoder, named.
    """
    if decoder is None:
        raise UnsupportedModelError(f"{source}: the tokenizer has no decoder")
    if decoder["type"] == "ByteLevel":
        return ByteLevelScheme()
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return _byte_fallback_scheme(steps, source)


def _byte_level_alphabet() -> dict[int, int]:
    """Code point of the byte-level alphabet -> byte.

    GPT-2's map: printable Latin-1 characters stand for themselves, the other bytes in rising order
    for the code points from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: b for b in printable}, **{256 + i: b for i, b in enumerate(others)}}


class ByteLevelScheme:
    """Each character of a token stands for one byte; a token with any other character is itself."""

    def __init__(self) -> None:
        self._byte_of = _byte_level_alphabet()

    def token_text(self, token: str) -> TokenText:
        byte_of = self._byte_of
        try:
            return TokenText(bytes([byte_of[ord(char)] for char in token]))
        except KeyError:
            return TokenText(token.encode("utf-8"))

    def stream(self, *, continues: bool = False) -> TextStream:  # noqa: ARG002
        return _Utf8Stream()


class _Utf8Stream:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: TokenText) -> str:
        return self._utf8.decode(token.data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _byte_fallback_scheme(steps: Sequence[Mapping[str, Any]], source: str) -> ByteFallbackScheme:
    """``Replace* ByteFallback? (Fuse Strip?)?``, as sentencepiece conversions have it."""
    rest = list(steps)
    replacements = []
    while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
        step = rest.pop(0)
        replacements.append((step["pattern"]["String"], step["content"]))
    has_bytes = bool(rest) and rest[0]["type"] == "ByteFallback"
    if has_bytes:
        rest.pop(0)
    strip = ("", 0)
    if rest and rest[0]["type"] == "Fuse":
        rest.pop(0)
        if rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0:
            step = rest.pop(0)
            strip = (step["content"], step["start"])
    if rest or not steps:
        kinds = " ".join(step["type"] for step in steps)
        raise UnsupportedModelError(
            f"{source}: tokenizer decoder {kinds!r} is not supported; supported: ByteLevel, "
            "and Replace, ByteFallback, Fuse, Strip in this order"
        )
    return ByteFallbackScheme(replacements, has_bytes=has_bytes, strip=strip)


class ByteFallbackScheme:
    """Tokens are text with replacements (``▁`` for a space); ``<0xNN>`` is a raw byte.

    Args:
        replacements: applied to each token in order.
        has_bytes: whether ``<0xNN>`` is a byte.
        strip: a character, and how many of it are dropped at the start of the whole text.
    """

    def __init__(
        self, replacements: Sequence[tuple[str, str]], *, has_bytes: bool, strip: tuple[str, int]
    ) -> None:
        self._replacements = tuple(replacements)
        self._has_bytes = has_bytes
        self._strip = strip

    def token_text(self, token: str) -> TokenText:
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._has_bytes and (byte := _BYTE_TOKEN.fullmatch(token)):
            return TokenText(bytes.fromhex(byte[1]), is_byte=True)
        return TokenText(token.encode("utf-8"))

    def stream(self, *, continues: bool = False) -> TextStream:
        return _ByteFallbackStream(*(("", 0) if continues else self._strip))


class _ByteFallbackStream:
    """Raw bytes are held until their run ends: one wrong byte turns its whole run into one U+FFFD a
    byte, so no part of a run is certain before."""

    def __init__(self, strip_char: str, strip_count: int) -> None:
        self._run = bytearray()
        self._strip_char = strip_char
        self._strip_left = strip_count

    def push(self, token: TokenText) -> str:
        if token.is_byte:
            self._run += token.data
            return ""
        return self._strip(self._end_run() + token.data.decode("utf-8"))

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip_char:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text
