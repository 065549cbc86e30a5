"""The vocabulary of a GGUF file gives the same ids as the tokenizer.json it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.tokenizer import Tokenizer, chat_template_from_gguf, tokenizer_from_gguf


@pytest.fixture(scope="session")
def converted(byte_level_folder: Path) -> dict[str, Any]:
    """The byte-level vocabulary as a conversion to GGUF writes it."""
    rules = json.loads((byte_level_folder / "tokenizer.json").read_text())
    vocab = dict(rules["model"]["vocab"])
    types = dict.fromkeys(vocab.values(), 1)
    for token in rules["added_tokens"]:
        vocab[token["content"]] = token["id"]
        types[token["id"]] = 3 if token["special"] else 4
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types[vocab[token]] for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in rules["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab["<|im_start|>"],
        "tokenizer.ggml.eos_token_id": vocab["<|endoftext|>"],
        "tokenizer.chat_template": "{{ messages }}",
    }


def build(metadata: dict[str, Any], **changes: Any) -> Tokenizer:
    changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    merged = {**metadata, **changed}
    return tokenizer_from_gguf({k: v for k, v in merged.items() if v is not None}, "model.gguf")


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40) | st.text(st.sampled_from("a 1<tol>\n|im_end'sé"), max_size=40))
def test_ids_equal_those_of_tokenizer_json(
    byte_level: Tokenizer, converted: dict[str, Any], text: str
) -> None:
    tokenizer = build(converted)
    assert tokenizer.encode(text) == byte_level.encode(text)


def test_token_kinds(converted: dict[str, Any], byte_level: Tokenizer) -> None:
    tokenizer = build(converted)
    assert tokenizer.control_tokens == byte_level.control_tokens
    assert tokenizer.vocab_size == byte_level.vocab_size
    assert "<tool>" not in tokenizer.control_tokens
    assert tokenizer.encode("<tool>") == byte_level.encode("<tool>")
    assert len(tokenizer.encode("<tool>")) == 1


def test_end_of_sequence_ids(converted: dict[str, Any]) -> None:
    control = build(converted).control_tokens
    wanted = {control[s] for s in ("<|endoftext|>", "<|im_end|>", "<|eot_id|>")}
    assert build(converted).eos_token_ids == wanted
    named = build(converted, eot_token_id=control["<|user|>"], eom_token_id=control["[INST]"])
    assert named.eos_token_ids == wanted | {control["<|user|>"], control["[INST]"]}


def test_frame(converted: dict[str, Any]) -> None:
    plain = build(converted)
    bos, eos = plain.control_tokens["<|im_start|>"], plain.control_tokens["<|endoftext|>"]
    ids = plain.encode("The dog")
    assert bos not in ids
    both = build(converted, add_bos_token=True, add_eos_token=True)
    assert both.encode("The dog") == [bos, *ids, eos]
    assert both.encode("The dog", add_special_tokens=False) == ids
    assert build(converted, add_bos_token=True).encode("The dog") == [bos, *ids]


@pytest.mark.parametrize("name", ["$A", "a:b:c", "$B:7", "first", ""])
def test_frame_of_tokens_whatever_their_names(converted: dict[str, Any], name: str) -> None:
    tokens = [name, *converted["tokenizer.ggml.tokens"][1:]]
    changes = {"bos_token_id": 0, "add_bos_token": True, "add_eos_token": True, "eos_token_id": 0}
    tokenizer = build(converted, tokens=tokens, **changes)
    ids = build(converted).encode("The dog")
    assert tokenizer.encode("The dog") == [0, *ids, 0]


def test_llama_3_adds_the_first_token_by_itself(converted: dict[str, Any]) -> None:
    bos = build(converted).control_tokens["<|im_start|>"]
    assert build(converted, pre="llama-bpe").encode("a")[0] == bos
    assert build(converted, pre="llama-bpe", add_bos_token=False).encode("a")[0] != bos


def test_strings_for_templates(converted: dict[str, Any]) -> None:
    tokenizer = build(converted)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|endoftext|>")
    assert build(converted, bos_token_id=None).bos_token is None
    assert chat_template_from_gguf(converted, "model.gguf") == "{{ messages }}"
    assert chat_template_from_gguf({}, "model.gguf") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert'"),
        ({"model": None}, "None"),
        ({"pre": "klingon"}, "'klingon'"),
    ],
)
def test_unknown_kinds_are_refused_by_name(
    converted: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"model.gguf.*{message}"):
        build(converted, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is missing or empty"),
        ({"tokens": [1, 2]}, "list of strings"),
        ({"token_type": [1]}, "token_type must be a list of"),
        ({"token_type": 1}, "token_type must be a list of"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["ab"]}, "not a pair"),
        ({"merges": ["nosuch token"]}, "merges"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eot_token_id": "2"}, "eot_token_id is '2'"),
        ({"eot_token_id": True}, "eot_token_id is True"),
        ({"pre": ["smollm"]}, "pre must be a string"),
        ({"add_bos_token": "false"}, "add_bos_token is 'false'"),
        ({"add_eos_token": 1}, "add_eos_token is 1"),
    ],
)
def test_broken_metadata_is_refused(
    converted: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightFileError, match=message):
        build(converted, **changes)


def test_repeated_tokens_are_refused(converted: dict[str, Any]) -> None:
    tokens = list(converted["tokenizer.ggml.tokens"])
    tokens[-1] = tokens[-2]
    with pytest.raises(WeightFileError, match="1 tokens occur twice"):
        build(converted, tokens=tokens)
