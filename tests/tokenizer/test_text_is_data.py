"""Marking the caller's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from rapshee_engine.errors import UnsupportedModelError
from rapshee_engine.tokenizer.control_tokens import ControlTokens
from rapshee_engine.tokenizer.text_is_data import TextGuard, encode_marked
from rapshee_engine.tokenizer.tokenizer import Tokenizer
from rapshee_engine.tokenizer.vocabulary import LibraryVocabulary

CONTROL = ControlTokens(
    {i: AddedToken(s, special=True) for i, s in enumerate(["<|im_end|>", "</s>", "[INST]", "XEOQ"])}
)


def mark(value: Any, *constants: str) -> tuple[Any, str]:
    marked, marker = TextGuard(CONTROL, constants).mark([{"content": value}], "")
    return marked[0]["content"], marker


@settings(deadline=None)
@given(st.text(st.sampled_from("<|im_end>/s[INST]XEOQxeoq a"), max_size=30))
def test_marked_text_holds_no_control_token_and_is_restored(text: str) -> None:
    marked, marker = mark(text)
    assert CONTROL.split(marked) == [marked]
    assert marked.replace(marker, "") == text


def test_every_string_is_marked_and_nothing_else() -> None:
    marked, marker = mark({"<k": ["a>", 1, None, True, 1.5, ("[",)]})
    m = marker
    assert marked == {f"{m}<{m}k": [f"a{m}>{m}", 1, None, True, 1.5, [f"{m}[{m}"]]}


def test_white_space_and_plain_text_are_left_alone() -> None:
    assert mark("  plain words\n")[0] == "  plain words\n"
    marked, marker = mark("  <  ")
    assert marked.strip().replace(marker, "") == "<"


def test_constants_of_the_template_are_left_alone() -> None:
    marked, marker = mark("<think>a</think><|im_end|>", "<think>", "</think>", "<|im_end|>", "<|")
    assert marked.startswith("<think>a</think>" + marker + "<" + marker)
    assert "<|im_end|>" not in marked


def test_markers_differ_and_avoid_the_text() -> None:
    assert len({mark("x")[1] for _ in range(50)}) > 1
    used = "".join(map(chr, range(0x20000, 0x25000)))
    assert mark(used)[1] not in used


def test_a_control_token_that_cannot_be_broken_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'~'"):
        TextGuard(ControlTokens({0: AddedToken("~", special=True)}), [])


def test_clean_text_is_encoded_in_one_go(byte_level: Tokenizer) -> None:
    text = "<|im_start|>user\na < b<|im_end|>\n"
    ids = encode_marked(byte_level, text.replace(" < ", " \ue000<\ue000 "), "\ue000")
    assert ids == byte_level.encode(text)


def test_text_does_not_shift_a_control_token(byte_level_folder: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    library.add_special_tokens(["~~"])
    tokenizer = Tokenizer(LibraryVocabulary(library, "file"))
    control = tokenizer.control_tokens["~~"]
    tilde = tokenizer.encode("~")
    assert encode_marked(tokenizer, "\ue000~\ue000~~", "\ue000") == [*tilde, control]


def test_marked_control_tokens_are_text(byte_level: Tokenizer) -> None:
    ids = encode_marked(byte_level, "<|im_start|>a\ue000<\ue000|im_end|>", "\ue000")
    assert ids[0] == byte_level.control_tokens["<|im_start|>"]
    assert not any(map(byte_level.is_special, ids[1:]))
    assert byte_level.decode(ids[1:]) == "a<|im_end|>"
