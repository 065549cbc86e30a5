"""Decoder schemes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from rapshee_engine.errors import UnsupportedModelError
from rapshee_engine.tokenizer.token_text import token_scheme

REPLACE = decoders.Replace("▁", " ")
FALLBACK, FUSE = decoders.ByteFallback(), decoders.Fuse()
SUPPORTED = [
    decoders.ByteLevel(),
    decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)]),
    decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 2, 0)]),
    decoders.Sequence([REPLACE, FALLBACK, FUSE]),
    decoders.Sequence([REPLACE, FUSE, decoders.Strip(" ", 1, 0)]),
    decoders.ByteFallback(),
]
TOKEN = st.one_of(
    st.integers(0, 255).map("<0x{:02X}>".format),
    st.sampled_from(["▁", "▁▁", "▁a", "a", "b▁c", "<0xZZ>", "<0x 1>", "<0x1>", "", "é", "日", "Ġ"]),
    st.text(st.sampled_from(sorted(pre_tokenizers.ByteLevel.alphabet())), max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(TOKEN, max_size=12))
@pytest.mark.parametrize("decoder", SUPPORTED)
def test_streams_equal_the_reference_decoder(decoder: Any, tokens: list[str]) -> None:
    scheme = token_scheme(json.loads(decoder.__getstate__()), "file")
    stream = scheme.stream()
    text = "".join(stream.push(scheme.token_text(token)) for token in tokens) + stream.finish()
    assert text == decoder.decode(tokens)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.Sequence([FUSE, REPLACE]),
        decoders.Sequence([REPLACE, decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([REPLACE, FUSE, decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([]),
    ],
)
def test_other_decoders_are_refused(decoder: Any) -> None:
    state = json.loads(decoder.__getstate__())
    steps = state.get("decoders", [state])
    with pytest.raises(UnsupportedModelError, match="file: tokenizer decoder") as caught:
        token_scheme(state, "file")
    assert all(step["type"] in str(caught.value) for step in steps)


def test_no_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no decoder"):
        token_scheme(None, "file")
