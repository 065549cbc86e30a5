"""The sentencepiece vocabulary of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rapshee_engine.errors import WeightFileError
from rapshee_engine.tokenizer import Tokenizer, tokenizer_from_gguf
from reference.gguf_vocabulary import gguf_metadata

FOLDERS = Path(__file__).parent.parent / "golden" / "tokenizers"


def build(name: str = "legacy", **changes: Any) -> Tokenizer:
    general = {"general.name": changes.pop("general_name", "Tiny")}
    return tokenizer_from_gguf(general | gguf_metadata(FOLDERS / name, **changes), "model.gguf")


def changed(key: str, index: int, value: Any) -> dict[str, Any]:
    """The list ``key`` with one item changed."""
    values = list(gguf_metadata(FOLDERS / "legacy")[f"tokenizer.ggml.{key}"])
    values[index] = value
    return {key: values}


def test_token_kinds() -> None:
    tokenizer = build()
    assert tokenizer.control_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 420}
    assert (tokenizer.bos_token, tokenizer.eos_token_ids) == ("<s>", {2})
    assert tokenizer.control.unknown_id == 0
    plain = tokenizer.encode("<s><tool>", add_special_tokens=False, parse_special=False)
    assert plain[-1] == 421
    assert not any(map(tokenizer.is_special, plain))


def test_user_defined_spaces_and_lines() -> None:
    tokenizer = build("gemma")
    texts = ["\n", "\n\n\n", "   ", "<table>"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert all(len(text_ids) == 1 for text_ids in ids)
    assert [tokenizer.token_bytes(text_ids[0]).decode() for text_ids in ids] == texts


def test_the_prefix_follows_each_added_token() -> None:
    spaced, bare = build(), build(add_space_prefix=False)
    text = "the<tool>the<s>the"
    for tokenizer, expected in ((spaced, b" the<tool> the<s> the"), (bare, text.encode())):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == expected


def test_defaults() -> None:
    names = ("bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token")
    missing: dict[str, Any] = dict.fromkeys((*names, "add_eos_token", "add_space_prefix"))
    tokenizer = build(**missing)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    ids = tokenizer.encode("the")
    assert ids == [1, *build().encode("the", add_special_tokens=False)]


def test_tokens_of_phi_3_swallow_spaces() -> None:
    for name, size in (("Phi-3 Mini", 2), ("Tiny", 4)):
        tokenizer = build(general_name=name, add_space_prefix=False)
        assert len(tokenizer.encode("</s> \n</s>", add_special_tokens=False)) == size
        assert len(tokenizer.encode("<s> \n<s>", add_special_tokens=False)) == 4


def test_another_unknown_token() -> None:
    tokenizer = build(unknown_token_id=420)
    assert tokenizer.control.unknown_id == 420
    assert tokenizer.encode("😀the") == build().encode("😀the")


def test_an_empty_token_is_never_found() -> None:
    tokenizer = build(**changed("tokens", 400, ""))
    assert tokenizer.token_text(400) is not None
    assert 400 not in tokenizer.encode("[EMPTY_400]")


def test_a_map_of_characters() -> None:
    metadata = gguf_metadata(FOLDERS / "unigram")
    assert "tokenizer.ggml.precompiled_charsmap" not in metadata
    with pytest.raises(WeightFileError, match="precompiled_charsmap: it is truncated"):
        build(precompiled_charsmap=[-1, 255])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, r"scores must be a list of 422 numbers"),
        ({"scores": [0.0]}, r"scores must be a list of 422 numbers"),
        (changed("scores", 5, "1"), r"scores must be a list of numbers"),
        (changed("scores", 300, float("nan")), r"score of piece 300 .* is nan"),
        (changed("scores", 300, 3e38), r"score of piece 300 .* is 3e\+38"),
        (changed("token_type", 7, 0), r"token_type of token 7 is 0 \(1 to 6\)"),
        (changed("token_type", 7, True), r"token_type of token 7 is True"),
        (changed("token_type", 7, 1), r"255 byte pieces"),
        (changed("tokens", 300, "x" * 5000), r"piece 300 .* 5000 characters"),
        (changed("tokens", 300, "</s>"), r"piece '</s>' occurs 2 times"),
        (changed("tokens", 420, "<s>"), r"piece '<s>' occurs 2 times"),
        ({"unknown_token_id": 10}, r"unknown_token_id is 10, a token of type 6"),
        ({"unknown_token_id": 999}, r"unknown_token_id is 999"),
        ({"add_space_prefix": 1}, r"add_space_prefix is 1, not a boolean"),
        ({"add_bos_token": "yes"}, r"add_bos_token is 'yes', not a boolean"),
        ({"precompiled_charsmap": [300]}, r"precompiled_charsmap must be a list of bytes"),
        ({"precompiled_charsmap": "abc"}, r"precompiled_charsmap must be a list of bytes"),
    ],
)
def test_broken_metadata_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightFileError, match=rf"model\.gguf: .*{message}"):
        build(**changes)
