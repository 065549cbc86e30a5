"""Pre-tokenizer rules, by the words they cut."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from rapshee_engine.errors import UnsupportedModelError
from rapshee_engine.tokenizer.pre_tokenizers import pre_tokenizer

TEXT = "I'LL don't 1234  x\n\n y+=1!"


def words(name: str, text: str) -> list[str]:
    pieces = pre_tokenizer(name, "file").rule().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", "I|'|LL| don|'t| 1234| | x|\n\n| y|+=|1|!"),
        ("smollm", "I|'|LL| don|'t| |1|2|3|4| | x|\n\n| y|+=|1|!"),
        ("llama-bpe", "I|'LL| don|'t| |123|4| | x|\n\n| y|+=|1|!"),
        ("qwen2", "I|'LL| don|'t| |1|2|3|4| | x|\n\n| y|+=|1|!"),
        ("tekken", "I|'LL| don|'t| |1|2|3|4| | x|\n\n| y|+=|1|!"),
        ("default", "I|'|LL| don|'|t| |123|4| | x|\n\n| y|+=|1|!"),
    ],
)
def test_words(name: str, expected: str) -> None:
    assert words(name, TEXT) == expected.split("|")


def test_gpt2_words_are_the_librarys() -> None:
    library = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for text in (TEXT, "", " ", "a  \n\n  b", "é½Ⅷ٣ 😀 日本 \u00a0x"):
        assert pre_tokenizer("gpt-2", "f").rule().pre_tokenize_str(
            text
        ) == library.pre_tokenize_str(text)


def test_flags() -> None:
    llama3, gpt2 = pre_tokenizer("llama-bpe", "file"), pre_tokenizer("gpt-2", "file")
    assert (llama3.ignore_merges, llama3.add_bos) == (True, True)
    assert (gpt2.ignore_merges, gpt2.add_bos) == (False, False)
    normalizer = pre_tokenizer("qwen2", "file").normalizer()
    assert normalizer is not None
    assert normalizer.normalize_str("e\u0301") == "é"
    assert llama3.normalizer() is None


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"file: pre-tokenizer 'klingon'.*llama-bpe"):
        pre_tokenizer("klingon", "file")
