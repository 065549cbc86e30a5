"""Steps of real tokenizers pass, steps that make much of little do not. More attacks are in
``tests/hostile``."""

from __future__ import annotations

import base64

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rapshee_engine.errors import InvalidRequestError, UnsupportedModelError, WeightFileError
from rapshee_engine.tokenizer.library_checks import (
    check_library_tokenizer,
    check_steps,
    library_errors,
)

ONE = {"<unk>": 0, "▁": 1, "a": 2}


def make(vocab: dict[str, int] = ONE) -> Tokenizer:
    return Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))


def test_steps_of_sentencepiece_conversions_pass() -> None:
    hf = make()
    hf.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()]
    )
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    check_library_tokenizer(hf, "tokenizer.json")


def test_steps_of_byte_level_vocabularies_pass(byte_level_folder: object) -> None:
    hf = Tokenizer.from_file(f"{byte_level_folder}/tokenizer.json")
    check_library_tokenizer(hf, "tokenizer.json")


def test_growth_is_bounded_over_all_steps() -> None:
    hf = make()
    twice = [normalizers.Replace("a", "b" * 4), normalizers.Replace("b", "c" * 4)]
    hf.normalizer = normalizers.Sequence(twice)
    check_library_tokenizer(hf, "tokenizer.json")
    hf.normalizer = normalizers.Sequence([*twice, normalizers.Replace("cc", "ddd")])
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: its normalizer makes 24"):
        check_library_tokenizer(hf, "tokenizer.json")


@pytest.mark.parametrize(("longest", "passes"), [(60, True), (61, False)])
def test_growth_of_a_table_of_characters(longest: int, passes: bool) -> None:
    step = {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x\0" + b"y" * longest)}
    if passes:
        check_steps(step, "its normalizer")
    else:
        with pytest.raises(UnsupportedModelError, match="makes 61 characters of one"):
            check_steps(step, "its normalizer")


def charsmap(texts: bytes) -> str:
    """The size of a trie, the trie, and what it points to, as sentencepiece writes them."""
    trie = bytes(1024)
    return base64.b64encode(len(trie).to_bytes(4, "little") + trie + texts + b"\0").decode()


def test_replacing_nothing_is_refused() -> None:
    hf = make()
    hf.normalizer = normalizers.Replace("", "b")
    with pytest.raises(UnsupportedModelError, match="replaces the empty string"):
        check_library_tokenizer(hf, "tokenizer.json")


def test_ids_are_unique_and_no_larger_than_those_of_models() -> None:
    with pytest.raises(WeightFileError, match="two of its tokens have one id"):
        check_library_tokenizer(make({**ONE, "b": 2}), "tokenizer.json")
    check_library_tokenizer(make({**ONE, "b": (1 << 24) - 1}), "tokenizer.json")
    with pytest.raises(WeightFileError, match="has a token with the id 16777216"):
        check_library_tokenizer(make({**ONE, "b": 1 << 24}), "tokenizer.json")


def test_an_added_token_may_take_the_place_of_a_token() -> None:
    hf = make()
    hf.add_special_tokens([AddedToken("a", special=True)])
    check_library_tokenizer(hf, "tokenizer.json")


def test_a_tokenizer_that_fails_is_refused() -> None:
    hf = Tokenizer(models.WordLevel({"a": 0}, unk_token="<nosuch>"))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(WeightFileError, match="fails on a plain text"):
        check_library_tokenizer(hf, "tokenizer.json")


class PanicException(BaseException):
    """As the library's own, which cannot be imported."""


def test_panics_become_the_error_and_interrupts_pass() -> None:
    error = InvalidRequestError("refused")
    for caught in (ValueError("x"), PanicException("x")):
        with pytest.raises(InvalidRequestError, match="refused"), library_errors(error):
            raise caught
    with pytest.raises(KeyboardInterrupt), library_errors(error):
        raise KeyboardInterrupt
    with pytest.raises(UnsupportedModelError, match="own"), library_errors(error):
        raise UnsupportedModelError("own")
