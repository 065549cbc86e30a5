"""Ten thousand texts give the ids and the text that they give with the reference libraries.

`tests/golden/make_tokenizer_strings.py` wrote what these make of them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rapshee_engine.tokenizer import (
    Detokenizer,
    Tokenizer,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from reference.gguf_vocabulary import gguf_metadata
from reference.tokenizer_strings import digests, tokenizer_strings

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return json.loads((GOLDEN / "tokenizer_strings.json").read_text())["kinds"]


def detokenized(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of the ids, pushed one by one."""
    stream = Detokenizer(tokenizer, skip_special_tokens=False)
    return "".join([*(stream.push([token_id]) for token_id in ids), stream.finish()])


def check(tokenizer: Tokenizer, kind: dict[str, Any]) -> None:
    texts = tokenizer_strings(kind["specials"])
    ids = [tokenizer.encode(text) for text in texts]
    each, whole = digests((i, detokenized(tokenizer, i)) for i in ids)
    expected = np.frombuffer(base64.b64decode(kind["each"]), np.uint8)
    wrong = [texts[i] for i in np.flatnonzero(each != expected)]
    assert not wrong, f"{len(wrong)} texts differ, the first is {wrong[0]!r}"
    assert whole == kind["whole"]
    for text_ids in ids[::7]:
        text = tokenizer.decode(text_ids, skip_special_tokens=False)
        assert text == detokenized(tokenizer, text_ids)


@pytest.mark.parametrize("name", ["llama", "legacy", "gemma", "unigram", "unknown"])
def test_sentencepiece_folders(name: str, kinds: dict[str, Any]) -> None:
    check(tokenizer_from_folder(GOLDEN / "tokenizers" / name), kinds[name])


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_tokenizer_json(name: str, kinds: dict[str, Any]) -> None:
    check(tokenizer_from_folder(GOLDEN / "chat_tokenizers" / name), kinds[name])


@pytest.mark.parametrize("name", ["legacy", "gemma", "unknown"])
def test_gguf(name: str, kinds: dict[str, Any]) -> None:
    metadata = gguf_metadata(GOLDEN / "tokenizers" / name)
    check(tokenizer_from_gguf(metadata, "model.gguf"), kinds[name])
