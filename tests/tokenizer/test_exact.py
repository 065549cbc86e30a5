"""Ten thousand texts give the ids and the text that they give with the reference libraries."""

from __future__ import annotations

import pytest

from rapshee_engine.tokenizer import tokenizer_from_folder, tokenizer_from_gguf
from reference.gguf_vocabulary import gguf_metadata
from reference.golden import GOLDEN_FOLDER
from reference.tokenizer_check import check_tokenizer

FOLDERS = GOLDEN_FOLDER / "tokenizers"


@pytest.mark.parametrize("name", ["llama", "legacy", "gemma", "unigram", "unknown"])
def test_sentencepiece_folders(name: str) -> None:
    check_tokenizer(tokenizer_from_folder(FOLDERS / name), name)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_tokenizer_json(name: str) -> None:
    check_tokenizer(tokenizer_from_folder(GOLDEN_FOLDER / "chat_tokenizers" / name), name)


@pytest.mark.parametrize("name", ["legacy", "gemma", "unknown"])
def test_gguf(name: str) -> None:
    check_tokenizer(tokenizer_from_gguf(gguf_metadata(FOLDERS / name), "model.gguf"), name)
