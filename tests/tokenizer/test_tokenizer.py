"""The tokenizer over the small golden vocabularies."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rapshee_engine.errors import InvalidRequestError
from rapshee_engine.tokenizer import Tokenizer


def test_equals_the_library(byte_level: Tokenizer, byte_level_folder: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    text = "The dog <|im_end|> 123 😀 <tool>"
    assert byte_level.encode(text) == library.encode(text).ids
    assert byte_level.vocab_size == 1 + max(library.get_vocab().values())


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_text_survives_without_special_tokens(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False, parse_special=False)
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()


def test_special_tokens_are_parsed_only_on_demand(tokenizer: Tokenizer) -> None:
    for string, token_id in tokenizer.control_tokens.items():
        parsed = tokenizer.encode(string, add_special_tokens=False)
        plain = tokenizer.encode(string, add_special_tokens=False, parse_special=False)
        assert parsed == [token_id]
        assert tokenizer.is_special(token_id)
        assert not any(map(tokenizer.is_special, plain))
        assert tokenizer.decode(plain) == string


def test_user_defined_tokens_are_always_parsed(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<tool>", parse_special=False)
    assert byte_level.token_bytes(ids[-1]) == b"<tool>"
    assert not byte_level.is_special(ids[-1])


def test_token_bytes(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    emoji = "😀".encode()
    for tokenizer in (byte_level, byte_fallback):
        ids = tokenizer.encode("a😀", add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).endswith(b"a" + emoji)
        for string, token_id in tokenizer.control_tokens.items():
            assert tokenizer.token_bytes(token_id) == string.encode()
        assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
        assert tokenizer.token_bytes(-1) == b""
    newline = byte_fallback.encode("\n", add_special_tokens=False)[-1]
    assert byte_fallback.token_bytes(newline) == b"\n"


def test_continuation_has_no_space_of_its_own(byte_fallback: Tokenizer) -> None:
    assert byte_fallback.token_bytes(byte_fallback.encode("dog")[0]) == b" dog"
    ids = byte_fallback.encode_continuation("dog</s>")
    assert b"".join(map(byte_fallback.token_bytes, ids)) == b"dog</s>"
    assert not any(map(byte_fallback.is_special, ids))


def test_named_tokens(byte_fallback: Tokenizer) -> None:
    assert (byte_fallback.bos_token, byte_fallback.bos_token_id) == ("<s>", 1)
    assert (byte_fallback.eos_token, byte_fallback.eos_token_ids) == ("</s>", {2})


@pytest.mark.parametrize("parse_special", [True, False])
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, parse_special: bool) -> None:
    with pytest.raises(InvalidRequestError, match=r"lone surrogate \(U\+D800\) at character 2"):
        tokenizer.encode("ab\ud800", parse_special=parse_special)


def test_empty_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert tokenizer.decode([]) == ""


def test_without_a_vocabulary_there_are_ids_only() -> None:
    tokenizer = Tokenizer.without_vocabulary()
    assert tokenizer.vocab_size == 0
    assert tokenizer.eos_token_ids == frozenset()
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.token_bytes(5) == b""
    assert tokenizer.token_text(5) is None
    with pytest.raises(InvalidRequestError, match="takes prompt_token_ids, not a text") as caught:
        tokenizer.encode("a")
    assert caught.value.param == "prompt"


def test_a_vocabulary_is_enough(byte_level: Tokenizer) -> None:
    byte_level.require_vocabulary("a text", "prompt")
