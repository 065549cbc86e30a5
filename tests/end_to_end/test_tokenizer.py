"""The default model's tokenizer, on ten thousand texts."""

from __future__ import annotations

from pathlib import Path

from rapshee_engine.tokenizer import tokenizer_from_gguf
from rapshee_engine.weights.gguf import read_gguf
from reference.tokenizer_check import check_tokenizer


def test_ids_and_text_are_the_references(default_model: Path) -> None:
    metadata = read_gguf(default_model).metadata
    check_tokenizer(tokenizer_from_gguf(metadata, str(default_model)), "smollm2")
