"""Where a text holds control tokens."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from rapshee_engine.errors import UnsupportedModelError
from rapshee_engine.tokenizer.control_tokens import ControlTokens


def control(*strings: str) -> ControlTokens:
    return ControlTokens({i: AddedToken(s, special=True) for i, s in enumerate(strings)})


def test_the_longest_of_the_leftmost_wins() -> None:
    tokens = control("<a>", "<a><b>", "<b><c>")
    assert tokens.split("x<a><b><c>y") == ["x", "<a><b>", "<c>y"]
    assert tokens.split("<b><c>") == ["", "<b><c>", ""]


def test_no_control_tokens_split_nothing() -> None:
    assert control().split("<a>") == ["<a>"]


def test_edges_in_each_case() -> None:
    assert control(" <EOS>", "bosX").edges == frozenset("<>bBxX")


@pytest.mark.parametrize("text", ["x<eos>y", "<EOS>", "abc<", "abc<E", ">abc", "os>", "<"])
def test_touching_text(text: str) -> None:
    assert control("<EOS>").touches(text)


@pytest.mark.parametrize("text", ["</think>x", "x<eo", "eos", "a < b > c", ""])
def test_text_that_touches_nothing(text: str) -> None:
    assert not control("<|eos|>").touches(text)


def test_short_strings_cannot_be_broken() -> None:
    control("ab").require_breakable()
    with pytest.raises(UnsupportedModelError, match="'~ '"):
        control("ab", "~ ").require_breakable()


def test_flags_and_unknown() -> None:
    tokens = ControlTokens(
        {7: AddedToken("<a>", special=True, lstrip=True), 8: AddedToken("<unk>", special=True)},
        unknown="<unk>",
    )
    assert (tokens.lstrip("<a>"), tokens.rstrip("<a>")) == (True, False)
    assert tokens.unknown_id == 8
    assert control("<a>").unknown_id is None


def test_strings_are_no_longer_than_such_strings_are() -> None:
    control("<" + "x" * 127)
    with pytest.raises(UnsupportedModelError, match="is 129 characters long"):
        control("<" + "x" * 128)
