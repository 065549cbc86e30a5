"""Pre-tokenizer rules, by the words they cut."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from rapshee_engine.errors import UnsupportedModelError
from rapshee_engine.tokenizer.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer
from rapshee_engine.tokenizer.token_text import ByteLevelScheme
from reference.tokenizer_strings import tokenizer_strings

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


# A capital in a word, a lone mark, a fraction, three scripts in a row, a slash before a new line.
MIXED = "I'LL 12 don't\n\n +=1 aBc e\u0301 4½ 日이x/\n "


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("mpt", "I~'~LL~ 12~ don~'t~\n\n~ +=~1~ aBc~ e~\u0301~ 4½~ 日이x~/~\n "),
        ("command-r", "I~'~LL~ ~1~2~ don~'t~\n\n~ +=~1~ aBc~ e~\u0301~ ~4~½~ 日이x~/~\n "),
        (
            "dbrx glm4 minicpm5 jais-2",
            "I~'LL~ ~12~ don~'t~\n\n~ +=~1~ aBc~ e~\u0301~ ~4½~ 日이x~/\n~ ",
        ),
        (
            "hunyuan bailingmoe",
            "I~'LL~ ~1~2~ don~'t~\n\n~ +=~1~ aBc~ e~\u0301~ ~4~½~ 日이x~/\n~ ",
        ),
        ("qwen35", "I~'LL~ ~1~2~ don~'t~\n\n~ +=~1~ aBc~ e\u0301~ ~4~½~ 日이x~/\n~ "),
        (
            "seed-coder laguna",
            "I~'LL~ ~1~2~ don~'t~\n\n~ +=~1~ aBc~ e~\u0301~ ~4~½~ 日이x~/~\n~ ",
        ),
        ("exaone-moe", "I~'LL~ ~1~2~ don~'t~\n\n~ +=~1~ aBc e\u0301~ ~4~½~ 日이x~/\n~ "),
        ("gpt-4o", "I'LL~ ~12~ don't~\n\n~ +=~1~ a~Bc~ e\u0301~ ~4½~ 日이x~/\n~ "),
        ("youtu", "I'LL~ ~1~2~ don't~\n\n~ +=~1~ a~Bc~ e\u0301~ ~4~½~ ~日~이~x~/\n~ "),
        (
            "deepseek-coder",
            "I~'~LL~ ~1~2~ don~'~t~\n~\n~ +=~1~ aBc~ e~\u0301 ~4~½~ ~日이~x~/~\n~ ",
        ),
        ("deepseek-v3", "I~'LL~ ~12~ don~'t~\n\n~ +=~1~ aBc~ e\u0301~ ~4½~ ~日~이x~/\n~ "),
        ("spark2_5", "I~'LL~ ~1~2~ don~'t~\n~\n~ +=~1~ aBc~ e\u0301~ ~4~½~ ~日~이x~/~\n~ "),
        ("bloom", "I'LL~ 12~ don't~\n\n~ +=1~ aBc~ e\u0301~ 4½~ 日이x/~\n "),
        ("viking", "I'LL~ ~1~2~ don't~\n\n~ +=~1~ aBc~ e\u0301~ ~4~½~ 日이x/~\n "),
    ],
)
def test_words_of_mixed_text(names: str, expected: str) -> None:
    for name in names.split():
        assert words(name, MIXED) == expected.split("~"), name


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return tokenizer_strings([])[::200]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_no_text_is_lost(name: str, texts: list[str]) -> None:
    rule, scheme = pre_tokenizer(name, "file").rule(), ByteLevelScheme()
    for text in texts:
        pieces = rule.pre_tokenize_str(text)
        assert b"".join(scheme.token_text(piece).data for piece, _ in pieces) == text.encode()


def test_falcon_cuts_characters_whose_bytes_look_like_digits() -> None:
    pieces = pre_tokenizer("falcon", "file").rule().pre_tokenize_str("a 1234 ½ x.")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "123", "4", "ĠÂ", "½", "Ġx", "."]


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
