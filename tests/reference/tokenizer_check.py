"""Compares a tokenizer with its reference, as `tests/golden/make_tokenizer_strings.py` wrote it."""

from __future__ import annotations

import base64
import json

import numpy as np

from rapshee_engine.tokenizer import Detokenizer, Tokenizer
from reference.golden import GOLDEN_FOLDER
from reference.tokenizer_strings import digests, tokenizer_strings

__all__ = ["check_tokenizer"]


def check_tokenizer(tokenizer: Tokenizer, kind: str) -> None:
    """Assert that ids and text, pushed token by token, are the reference's for each string."""
    golden = json.loads((GOLDEN_FOLDER / "tokenizer_strings.json").read_text())["kinds"][kind]
    texts = tokenizer_strings(golden["specials"])
    ids = [tokenizer.encode(text) for text in texts]
    each, whole = digests((i, _detokenized(tokenizer, i)) for i in ids)
    expected = np.frombuffer(base64.b64decode(golden["each"]), np.uint8)
    wrong = [texts[i] for i in np.flatnonzero(each != expected)]
    assert not wrong, f"{len(wrong)} texts differ, the first is {wrong[0]!r}"
    assert whole == golden["whole"]
    for text_ids in ids[::7]:
        text = tokenizer.decode(text_ids, skip_special_tokens=False)
        assert text == _detokenized(tokenizer, text_ids)


def _detokenized(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = Detokenizer(tokenizer, skip_special_tokens=False)
    return "".join([*(stream.push([token_id]) for token_id in ids), stream.finish()])
