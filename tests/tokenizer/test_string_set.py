"""Against the regular expression that means the same."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapshee_engine.tokenizer.string_set import StringSet

LETTERS = st.text("ab<]^-\\é", max_size=5)
STRINGS = st.lists(LETTERS.filter(bool), max_size=8)


def expression(strings: list[str]) -> re.Pattern[str]:
    longest_first = sorted(strings, key=lambda string: (-len(string), string))
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


@settings(max_examples=400)
@given(strings=STRINGS, text=st.text("ab<]^-\\é", max_size=30))
def test_splits_like_the_expression(strings: list[str], text: str) -> None:
    assert StringSet(strings).split(text) == expression(strings).split(text)


@settings(max_examples=400)
@given(strings=STRINGS, text=LETTERS)
def test_touches(strings: list[str], text: str) -> None:
    wanted = any(
        string in text
        or any(
            text.endswith(string[:size]) or text.startswith(string[-size:])
            for size in range(1, min(len(string), len(text) + 1))
        )
        for string in strings
    )
    assert StringSet(strings).touches(text) == wanted


@pytest.mark.parametrize("strings", [[], [""]])
def test_nothing_is_found_where_there_is_nothing(strings: list[str]) -> None:
    empty = StringSet(strings)
    assert empty.split("text") == ["text"]
    assert not empty.touches("text")


def test_many_strings_are_no_trouble() -> None:
    many = StringSet(f"<{i}>" for i in range(200_000))
    text = "<" * 100_000 + "<7>" + "<1" * 100_000
    assert many.split(text)[1::2] == ["<7>"]
