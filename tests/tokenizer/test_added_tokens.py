"""Added tokens by their flags."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from rapshee_engine.tokenizer.added_tokens import AddedTokens

TOKENS = {
    7: AddedToken("<s>", special=True, normalized=False),
    70: AddedToken("<left>", special=True, lstrip=True, normalized=False),
    71: AddedToken("<right>", special=True, rstrip=True, normalized=False),
    5: AddedToken("one", single_word=True, normalized=False),
    6: AddedToken("ab", normalized=False),
    9: AddedToken("abc", normalized=False),
    8: AddedToken("xx", normalized=True),
    3: AddedToken("xxy", normalized=False),
}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("plain", ["plain"]),
        ("<s>", [7]),
        ("a<s><s>é", ["a", 7, 7, "é"]),
        ("a \n<left> b", ["a", 70, " b"]),
        ("a <right> \n b", ["a ", 71, "b"]),
        ("one bone one", [5, " bone ", 5]),
        ("abcab", [9, 6]),
        ("xxxy", ["x", 3]),
        ("xxx", [8, "x"]),
        ("😀<s>👩\u200d👧", ["😀", 7, "👩\u200d👧"]),
        ("xxxxxxxxx", [8, 8, 8, 8, "x"]),
    ],
)
def test_parts(text: str, parts: list[int | str]) -> None:
    assert list(AddedTokens(TOKENS).split(text, parse_special=True)) == parts


def test_control_tokens_are_text_on_demand() -> None:
    parts = AddedTokens(TOKENS).split("<s>abc<right> x", parse_special=False)
    assert list(parts) == ["<s>", 9, "<right> x"]


def test_no_tokens() -> None:
    assert list(AddedTokens({}).split("a b", parse_special=True)) == ["a b"]
