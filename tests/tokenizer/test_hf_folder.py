"""Hugging Face folders: where everything is found, and broken files by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.tokenizer import chat_template_from_folder, tokenizer_from_folder


@pytest.fixture
def folder(tmp_path: Path, byte_level_folder: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_folder / "tokenizer.json").read_bytes())
    return tmp_path


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def test_tokenizer_json_alone_is_enough(folder: Path) -> None:
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token_ids == frozenset()
    assert "<|im_end|>" in tokenizer.control_tokens


def test_named_tokens_are_strings_or_objects(folder: Path) -> None:
    write(
        folder / "tokenizer_config.json",
        {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}},
    )
    tokenizer = tokenizer_from_folder(folder)
    assert tokenizer.bos_token_id == tokenizer.control_tokens["<|im_start|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_ids == {tokenizer.control_tokens["<|im_end|>"]}


def test_the_special_tokens_map_is_overruled_by_the_config(folder: Path) -> None:
    write(folder / "special_tokens_map.json", {"bos_token": "<|user|>", "eos_token": "<|user|>"})
    write(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    tokenizer = tokenizer_from_folder(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|user|>", "<|im_end|>")


def test_named_tokens_become_control_tokens(folder: Path) -> None:
    write(
        folder / "tokenizer_config.json",
        {"eos_token": "Ġdog", "additional_special_tokens": ["<tool>", "not in the vocabulary"]},
    )
    plain = tokenizer_from_folder(folder)
    assert plain.encode("Ġdog") == [plain.control_tokens["Ġdog"]]
    assert "<tool>" in plain.control_tokens
    assert "not in the vocabulary" not in plain.control_tokens


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, {2, 5}),
        ({"eos_token_id": [5, 7]}, None, {2, 5, 7}),
        ({}, {"eos_token_id": 6}, {2, 6}),
        (None, None, {2}),
    ],
)
def test_end_of_sequence_ids(folder: Path, generation: Any, config: Any, ids: set[int]) -> None:
    write(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            write(folder / name, value)
    assert tokenizer_from_folder(folder).eos_token_ids == ids


def test_a_bad_end_of_sequence_id_is_refused(folder: Path) -> None:
    write(folder / "generation_config.json", {"eos_token_id": "2"})
    with pytest.raises(WeightFileError, match=r"generation_config\.json.*eos_token_id"):
        tokenizer_from_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', "\x00", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(WeightFileError, match=r"tokenizer\.json: not a readable tokenizer"):
        tokenizer_from_folder(tmp_path)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightFileError, match=r"tokenizer\.json: no such file"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_a_broken_config_is_refused_by_name(folder: Path, content: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(WeightFileError, match=r"tokenizer_config\.json"):
        tokenizer_from_folder(folder)


def test_an_unknown_decoder_is_refused_by_name(folder: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    write(folder / "tokenizer.json", rules)
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        tokenizer_from_folder(folder)


def test_truncation_and_padding_are_switched_off(folder: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    write(folder / "tokenizer.json", rules)
    assert len(tokenizer_from_folder(folder).encode("a b c d e f")) > 2


def test_chat_template_order(tmp_path: Path) -> None:
    assert chat_template_from_folder(tmp_path) is None
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    write(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert chat_template_from_folder(tmp_path) == "b"
    write(tmp_path / "tokenizer_config.json", {"chat_template": "c"})
    assert chat_template_from_folder(tmp_path) == "c"
    write(tmp_path / "chat_template.json", {"chat_template": "d"})
    assert chat_template_from_folder(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_text("e")
    assert chat_template_from_folder(tmp_path) == "e"


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(WeightFileError, match=r"chat_template\.jinja"):
        chat_template_from_folder(tmp_path)
