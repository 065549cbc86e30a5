"""Folders with a ``tokenizer.model``: what the settings change, and settings that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.tokenizer import Detokenizer, Tokenizer, tokenizer_from_folder

FOLDERS = Path(__file__).parent.parent / "golden" / "tokenizers"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(FOLDERS / "llama" / "tokenizer.model", tmp_path)
    return tmp_path


def build(folder: Path, name: str = "tokenizer_config.json", **settings: Any) -> Tokenizer:
    (folder / name).write_text(json.dumps(settings))
    return tokenizer_from_folder(folder)


def tokens(tokenizer: Tokenizer, text: str, **options: bool) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in tokenizer.encode(text, **options)]


def test_the_model_alone_is_enough(folder: Path) -> None:
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.vocab_size == 420
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, {2})
    assert tokenizer.control_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.control.unknown_id == 0
    assert tokenizer.encode("")[:1] == [1]


def test_a_tokenizer_json_goes_first(folder: Path, byte_level_folder: Path) -> None:
    shutil.copy(byte_level_folder / "tokenizer.json", folder)
    assert "<|im_end|>" in tokenizer_from_folder(folder).control_tokens


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_eos_token": None}, [1], []),
        ({"bos_token": None}, [], []),
        ({"bos_token": "not in the vocabulary"}, [], []),
        ({"bos_token": {"content": "</s>"}}, [2], []),
    ],
)
def test_frame(folder: Path, settings: dict[str, Any], first: list[int], last: list[int]) -> None:
    tokenizer = build(folder, **settings)
    inner = tokenizer.encode("dog", add_special_tokens=False)
    assert tokenizer.encode("dog") == [*first, *inner, *last]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "▁the|<s>|the"),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, "▁the|<s>|▁the"),
        ({"tokenizer_class": "InternLM2Tokenizer"}, "▁the|<s>|▁the"),
        ({"legacy": False}, "▁the|<s>|the"),
        ({"add_prefix_space": False}, "the|<s>|the"),
    ],
)
def test_prefix(folder: Path, settings: dict[str, Any], expected: str) -> None:
    tokenizer = build(folder, add_bos_token=False, **settings)
    pieces = [part.replace("▁", " ").encode() for part in expected.split("|")]
    text = b"".join(tokens(tokenizer, "the<s>the"))
    assert text == b"".join(pieces)
    assert tokenizer.decode(tokenizer.encode("the dog")) == "the dog"


def test_a_space_is_prefix_enough_without_legacy(folder: Path) -> None:
    modern, legacy = build(folder, legacy=False), build(folder, legacy=True)
    assert b"".join(tokens(modern, " the", add_special_tokens=False)) == b" the"
    assert b"".join(tokens(legacy, " the", add_special_tokens=False)) == b"  the"
    assert modern.encode_continuation("the") != modern.encode("the", add_special_tokens=False)
    assert legacy.encode_continuation("the") == legacy.encode("the", add_special_tokens=False)


def test_the_prefix_of_a_model_that_drops_spaces(folder: Path) -> None:
    shutil.copy(FOLDERS / "unigram" / "tokenizer.model", folder)
    for legacy in (True, False):
        tokenizer = build(folder, legacy=legacy, add_bos_token=False)
        assert b"".join(tokens(tokenizer, "  the   dog ")) == b" the dog"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_continuation("the"))) == b"the"


def test_added_tokens_of_both_files(folder: Path) -> None:
    build(folder, "added_tokens.json", **{"<a>": 420, "<b>": 421, "</s>": 2})
    decoder = {"421": {"content": "<b>", "special": True}, "430": {"content": "<c>"}}
    tokenizer = build(folder, added_tokens_decoder=decoder, additional_special_tokens=["<a>"])
    assert tokenizer.encode("<a><b><c></s>", add_special_tokens=False) == [420, 421, 430, 2]
    assert tokenizer.vocab_size == 431
    assert tokenizer.control_tokens.keys() == {"<unk>", "<s>", "</s>", "<a>", "<b>"}
    assert tokenizer.token_text(425) is None
    assert tokenizer.decode([420, 430], skip_special_tokens=True) == "<c>"


def test_named_tokens_become_control_tokens(folder: Path) -> None:
    names = {"pad_token": "<0x00>", "extra_special_tokens": {"image": "▁the", "other": "<none>"}}
    tokenizer = build(folder, **names)
    assert tokenizer.control_tokens.keys() == {"<unk>", "<s>", "</s>", "<0x00>", "▁the"}


def test_a_renamed_piece_is_found_by_its_new_name_alone(folder: Path) -> None:
    plain = tokenizer_from_folder(folder)
    old = plain.encode("dog", add_special_tokens=False)
    assert len(old) < 4
    tokenizer = build(folder, added_tokens_decoder={str(old[0]): {"content": "<new>"}})
    assert tokenizer.encode("<new>", add_special_tokens=False) == [old[0]]
    assert old[0] not in tokenizer.encode("dog", add_special_tokens=False)
    assert tokenizer.token_bytes(old[0]) == b"<new>"


def test_control_tokens_in_plain_text(folder: Path) -> None:
    tokenizer = tokenizer_from_folder(folder)
    ids = tokenizer.encode("<s>a</s>", add_special_tokens=False, parse_special=False)
    assert not any(map(tokenizer.is_special, ids))
    assert tokenizer.decode(ids) == "<s>a</s>"


def test_text_of_bytes(folder: Path) -> None:
    tokenizer = tokenizer_from_folder(folder)
    ids = tokenizer.encode("a😀\n", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" a\xf0\x9f\x98\x80\n"
    stream = Detokenizer(tokenizer)
    assert [piece for i in ids[:-1] if (piece := stream.push([i]))] == ["a"]
    assert stream.push(ids[-1:]) == "😀\n"
    assert tokenizer.decode(ids[:-2]) == "a\ufffd\ufffd\ufffd"


def test_a_file_that_is_no_model_is_refused(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(WeightFileError, match=r"tokenizer\.model: not a readable sentencepiece"):
        tokenizer_from_folder(folder)


def test_a_file_that_is_too_large_is_refused(folder: Path) -> None:
    with (folder / "tokenizer.model").open("ab") as file:
        file.truncate((1 << 25) + 1)
    with pytest.raises(WeightFileError, match=r"tokenizer\.model: is larger than 32 MiB"):
        tokenizer_from_folder(folder)


def test_an_unsupported_model_is_refused(folder: Path) -> None:
    content = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(content + b"\x12\x02\x18\x04")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model: .*'char'"):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is no object"),
        ({"added_tokens_decoder": {"-1": {"content": "<a>"}}}, "added_tokens_decoder has '-1'"),
        ({"added_tokens_decoder": {"1" * 30: {"content": "<a>"}}}, "added_tokens_decoder has '111"),
        ({"added_tokens_decoder": {"5": {"text": "<a>"}}}, "added_tokens_decoder has '5'"),
        ({"added_tokens_decoder": {"5": {"content": ""}}}, "added token 5 is empty"),
        ({"added_tokens_decoder": {"999999999": {"content": "<a>"}}}, "'<a>' has id 999999999"),
        ({"added_tokens_decoder": {"500": {"content": "<s>"}}}, "'<s>' has id 500, and also id 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightFileError, match=message):
        build(folder, **settings)


@pytest.mark.parametrize("token_id", ["420", 1.5, None, True])
def test_ids_of_added_tokens_are_integers(folder: Path, token_id: object) -> None:
    with pytest.raises(WeightFileError, match=r"added_tokens\.json: id of '<a>' is"):
        build(folder, "added_tokens.json", **{"<a>": token_id})
