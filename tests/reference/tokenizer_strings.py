"""Ten thousand texts that tokenizers get wrong, the same ones wherever they are made.

Only `random.Random.getrandbits` and explicit code points are used, so that neither Python's version
nor that of its Unicode tables changes a text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["COUNT", "digests", "tokenizer_strings"]

COUNT = 10_000
_SEED = 20_260


def _ranges(text: str) -> list[tuple[int, int]]:
    """First and last code points of ``41-5A 61-7A``."""
    pairs = (pair.partition("-") for pair in text.split())
    return [(int(first, 16), int(last or first, 16)) for first, _, last in pairs]


def _items(text: str) -> list[str]:
    return text.split(" ")


# Latin with accents, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Bengali, Tamil, Thai,
# Tibetan, Georgian, Hangul jamo, Ethiopic, Khmer, kana, CJK, Yi, Hangul, presentation forms, half
# and full width, Gothic, mathematical letters, rare ideographs.
_SCRIPTS = _ranges(
    "41-5A 61-7A C0-24F 370-3FF 400-4FF 531-587 5D0-5EA 620-64A 904-94D 985-9CD B83-BCD E01-E4E "
    "F40-F7E 10A0-10FF 1100-11FF 1200-137C 1780-17D3 3041-30FF 4E00-9FFF A000-A48C AC00-D7A3 "
    "FB00-FDCF FF01-FFEE 10330-1034A 1D400-1D7FF 20000-2A6DF"
)
_LATIN_TO_ARMENIAN = _SCRIPTS[:6]
_DIGITS = _ranges("30-39 660-669 966-96F 2160-2188 B2-B3")
_MARKS = _ranges("300-36F 483-489 591-5BD 64B-65F 20D0-20F0")
_SIGNS = _ranges(
    "21-2F 3A-40 5B-60 7B-7E 2010-205E 20A0-20C0 2190-21FF 2200-22FF 2500-259F 3001-301F"
)
_CONTROLS = _ranges("0-1F 7F-9F 200B-200F 202A-202E 2060-206F FEFF FFF9-FFFD E000-E010 FDD0-FDD3")
_EMOJI = _ranges("1F300-1F5FF 1F600-1F64F 1F680-1F6FF 1F900-1F9FF")
_SPACES = [*"    \n\n\t\r\u00a0\u2003\u3000\u0085\u2028\v\f\u2581\u1680\u202f", "\r\n"]
_ZWJ = _items(
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👨🏽\u200d💻 🧑\u200d🚀 ❤\ufe0f\u200d🔥 "
    "🇫🇷 🇩🇪🇯 1\ufe0f\u20e3 👍🏿 🏴\U000e0067\U000e0062\U000e0065\U000e007f \u200d \ufe0f"
)
_WORDS = _items(
    "the The quick I'll don't WE'RE it's 's 'LL you've l'été naïve hello world France Paris user "
    "assistant def return print(x) x+=1 self.value http://example.org/a?b=c&d=1 CamelCaseName "
    "snake_case_name <b> </b> {{x}} 1,000,000 3.14159 2024-11-27 0x0A <0x0A> <0xE2> C++ e\u0301 "
    "Straße ﬁn ½ 日本語 東京 안녕하세요 привет مرحبا नमस्ते สวัสดี ab▁cd ▁"
)


class _Source:
    """Draws from one seeded stream of bits."""

    def __init__(self, seed: int, specials: Sequence[str]) -> None:
        self._bits = random.Random(seed)
        self._specials = specials

    def below(self, limit: int) -> int:
        return self._bits.getrandbits(32) % limit

    def times(self, most: int, make: Callable[[], str]) -> str:
        return "".join(make() for _ in range(1 + self.below(most)))

    def one_of(self, items: Sequence[str]) -> str:
        return items[self.below(len(items))]

    def char(self, ranges: Sequence[tuple[int, int]]) -> str:
        first, last = ranges[self.below(len(ranges))]
        return chr(first + self.below(last - first + 1))

    def word(self) -> str:
        script = [_SCRIPTS[self.below(len(_SCRIPTS))]]
        return self.times(8, lambda: self.char(script))

    def number(self) -> str:
        digits = [_DIGITS[self.below(len(_DIGITS))]] if self.below(3) == 0 else _DIGITS[:1]
        return self.times(9, lambda: self.char(digits))

    def marked(self) -> str:
        """Letters with combining marks, and marks that follow no letter."""
        return self.times(4, lambda: self.char(_MARKS if self.below(2) else _LATIN_TO_ARMENIAN))

    def white(self) -> str:
        if self.below(2):
            return self.one_of(_SPACES) * (1 + self.below(40 if self.below(6) == 0 else 5))
        return self.times(6, lambda: self.one_of(_SPACES))

    def any_char(self) -> str:
        code = self.below(0x110000)
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"

    def special(self) -> str:
        """The text of an added token, whole, cut, or with something in it."""
        token = self.one_of(self._specials) if self._specials else "<s>"
        cut = self.below(len(token) + 1)
        return (token, token, token, token[:cut], token[cut:], token[:cut] + " " + token[cut:])[
            self.below(6)
        ]

    def long_word(self) -> str:
        piece = self.word() + self.one_of(_WORDS)
        return piece * (1 + 1500 // len(piece))

    def part(self) -> str:
        kinds = (
            lambda: self.one_of(_WORDS), lambda: " " + self.one_of(_WORDS), self.word, self.number,
            self.marked, self.white, lambda: self.times(4, lambda: self.char(_SIGNS)), self.special,
            lambda: self.times(3, lambda: self.char(_CONTROLS)), lambda: self.char(_EMOJI),
            lambda: self.one_of(_ZWJ), self.any_char, lambda: " " + self.word(),
        )  # fmt: skip
        return kinds[self.below(len(kinds))]()


def tokenizer_strings(specials: Sequence[str]) -> list[str]:
    """`COUNT` texts; ``specials`` are strings of added tokens, which occur in them often."""
    source = _Source(_SEED, specials)
    plain = [
        "",
        " ",
        "  ",
        "\n",
        "a",
        " a",
        "a ",
        "  a  b  ",
        "\u2581",
        "\u2581a",
        "▁▁▁",
        *_WORDS,
        *_ZWJ,
    ]
    plain += [*specials, *(" " + special + " a" for special in specials)]
    plain += [" " * size for size in range(3, 80)] + ["\n" * size for size in range(2, 60)]
    plain += [source.long_word() for _ in range(20)]
    return plain + [source.times(9, source.part) for _ in range(COUNT - len(plain))]


def digests(results: Iterable[tuple[Sequence[int], str]]) -> tuple[npt.NDArray[np.uint8], str]:
    """One byte for the ids and the decoded text of each string, and a digest of them all: the one
    says which string is wrong, the other that none is."""
    each, whole = [], hashlib.sha256()
    for ids, text in results:
        data = ",".join(map(str, ids)) + "|" + text
        digest = hashlib.sha256(data.encode()).digest()
        each.append(digest[0])
        whole.update(digest)
    return np.array(each, dtype=np.uint8), whole.hexdigest()
