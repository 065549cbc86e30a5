"""Incremental text: equal to the reference's decode of all tokens, cut at the stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapshee_engine.tokenizer import Detokenizer, Tokenizer

CHUNKS = st.lists(st.lists(st.integers(0, 620), max_size=6), max_size=12)


def run(detokenizer: Detokenizer, chunks: list[list[int]]) -> str:
    return "".join([*map(detokenizer.push, chunks), detokenizer.finish()])


@settings(max_examples=500, deadline=None)
@given(chunks=CHUNKS, skip=st.booleans(), which=st.booleans())
def test_any_tokens_give_the_reference_text(
    byte_level: Tokenizer,
    byte_fallback: Tokenizer,
    chunks: list[list[int]],
    skip: bool,
    which: bool,
) -> None:
    tokenizer = byte_level if which else byte_fallback
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = run(detokenizer, chunks)
    ids = [token_id for chunk in chunks for token_id in chunk]
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert detokenizer.stopped_by is None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(st.sampled_from("ab <>\n😀é日"), max_size=24),
    stops=st.lists(st.text(st.sampled_from("ab <\n😀日"), min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 5),
    include=st.booleans(),
    which=st.booleans(),
)
def test_stop_strings_cut_the_text(
    byte_level: Tokenizer,
    byte_fallback: Tokenizer,
    text: str,
    stops: list[str],
    size: int,
    include: bool,
    which: bool,
) -> None:
    tokenizer = byte_level if which else byte_fallback
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer, stop=stops, include_stop_str_in_output=include)
    pushed = run(detokenizer, [ids[i : i + size] for i in range(0, len(ids), size)])
    ends = [(whole.find(s) + len(s), -len(s), s) for s in stops if s in whole]
    if not ends:
        assert (pushed, detokenizer.stopped_by) == (whole, None)
        return
    end, _, stop = min(ends)
    assert detokenizer.stopped_by == stop
    assert pushed == whole[: end if include else end - len(stop)]


def test_never_gives_half_a_character(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level)
    ids = byte_level.encode("a😀b", add_special_tokens=False)
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert len(pieces) > 3
    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]
    assert detokenizer.finish() == ""


def test_an_incomplete_character_is_replaced_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a😀", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push(ids) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert byte_level.decode(ids) == "a\ufffd"


def test_text_that_may_begin_a_stop_string_is_held(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, stop=["\nUser:"])
    assert detokenizer.push(byte_level.encode("Hi.\nUs", add_special_tokens=False)) == "Hi."
    assert detokenizer.push(byte_level.encode("ed", add_special_tokens=False)) == "\nUsed"
    assert detokenizer.push(byte_level.encode("\nUser", add_special_tokens=False)) == ""
    assert detokenizer.finish() == "\nUser"


def test_tokens_after_the_stop_string_are_ignored(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("aSTb", add_special_tokens=False)
    detokenizer = Detokenizer(byte_level, stop=["ST"])
    assert detokenizer.push(ids) == "a"
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == ""


def test_a_stop_string_in_what_was_held_back(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("a😀", add_special_tokens=False)
    detokenizer = Detokenizer(byte_fallback, stop=["😀"])
    assert detokenizer.push(ids) == "a"
    assert detokenizer.stopped_by is None
    assert detokenizer.finish() == ""
    assert detokenizer.stopped_by == "😀"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab <\n😀é日"), min_size=2, max_size=24), data=st.data())
def test_text_goes_on_where_the_prompt_ends(
    byte_level: Tokenizer,
    byte_fallback: Tokenizer,
    sentencepiece: Tokenizer,
    text: str,
    data: st.DataObject,
) -> None:
    tokenizer = data.draw(st.sampled_from([byte_level, byte_fallback, sentencepiece]))
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    before, after = ids[:cut], ids[cut:]
    prompt, whole = tokenizer.decode(before), tokenizer.decode(ids)
    if "\ufffd" in prompt:
        return  # it ends inside a character
    assert prompt + run(Detokenizer(tokenizer, after=before), [after]) == whole


def test_an_answer_begins_a_text(sentencepiece: Tokenizer) -> None:
    prompt, answer = sentencepiece.encode("a b"), sentencepiece.encode("c")
    assert run(Detokenizer(sentencepiece), [answer]) == "c"
    assert run(Detokenizer(sentencepiece, after=prompt), [answer]) == " c"
    control = [token_id for token_id in prompt if sentencepiece.is_special(token_id)]
    assert control
    assert run(Detokenizer(sentencepiece, after=control), [answer]) == "c"


def test_control_tokens_are_skipped_unless_wanted(byte_level: Tokenizer) -> None:
    end = byte_level.control_tokens["<|im_end|>"]
    assert Detokenizer(byte_level).push([end]) == ""
    assert Detokenizer(byte_level, skip_special_tokens=False).push([end]) == "<|im_end|>"


@pytest.mark.parametrize("token_id", [-1, 10**9])
def test_ids_without_a_token_give_nothing(tokenizer: Tokenizer, token_id: int) -> None:
    assert Detokenizer(tokenizer).push([token_id]) == ""
