"""What a ``tokenizer.json`` must not make the `tokenizers` library do.

The library checks the form of a file, not what its steps amount to: forty replacements of one
letter by two turn that letter into 2^40, and memory that Rust cannot have ends the process.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tokenizers

from rapshee_engine.errors import RapsheeError, UnsupportedModelError, WeightFileError
from rapshee_engine.files import short_repr

__all__ = ["check_library_tokenizer", "check_steps", "library_errors"]

# Real ones replace a character by at most three, and put one token before a text and one behind.
_MAX_GROWTH = 16  # characters that a character may become, in all steps together
_MAX_TABLE_BYTES = 60  # that a table of characters may give; Unicode's own NFKC has 33
_MAX_ADDED = 64  # characters or tokens that may be put around a text
_MAX_TOKEN_ID = (1 << 24) - 1
_TRIAL = "A trial: 1 + 1\n"


@contextmanager
def library_errors(error: RapsheeError) -> Iterator[None]:
    """Raise ``error`` for what the library raises: bare exceptions, and panics, which derive from
    BaseException."""
    try:
        yield
    except RapsheeError:
        raise
    except BaseException as caught:
        if not isinstance(caught, Exception) and type(caught).__name__ != "PanicException":
            raise
        raise error from caught


def check_library_tokenizer(hf: tokenizers.Tokenizer, file: str) -> None:
    """Check a tokenizer that was read from ``file``, and try it.

    Raises:
        WeightFileError: two tokens have one id, an id is absurd, or it fails on a plain text.
        UnsupportedModelError: it could make far more of a text than the text.
    """
    _check_ids(hf.get_vocab(with_added_tokens=False), file)
    _check_ids({token.content: i for i, token in hf.get_added_tokens_decoder().items()}, file)
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        step = getattr(hf, name)
        if step is not None:
            check_steps(json.loads(step.__getstate__()), f"{file}: its {name}")
    with library_errors(WeightFileError(file, "the tokenizer fails on a plain text")):
        hf.decode(hf.encode(_TRIAL).ids)


def _check_ids(vocab: Mapping[str, int], file: str) -> None:
    largest = max(vocab.values(), default=0)
    if largest > _MAX_TOKEN_ID:
        raise WeightFileError(file, f"has a token with the id {largest} (at most {_MAX_TOKEN_ID})")
    if len(set(vocab.values())) != len(vocab):
        raise WeightFileError(file, "two of its tokens have one id")


def check_steps(step: Any, what: str) -> None:
    """Raise `UnsupportedModelError` if a step, as in ``tokenizer.json``, makes much of little."""
    growth, added = 1.0, 0
    for leaf in _leaves(step):
        kind = leaf.get("type")
        if kind == "Replace":
            growth *= _replacement_growth(leaf, what)
        elif kind == "Precompiled":
            growth *= _table_growth(leaf["precompiled_charsmap"])
        elif kind == "Prepend":
            added += len(leaf["prepend"])
        elif kind == "TemplateProcessing":
            added += _check_frame(leaf["single"], what)
    if growth > _MAX_GROWTH:
        raise UnsupportedModelError(
            f"{what} makes {growth:.3g} characters of one; at most {_MAX_GROWTH} are supported"
        )
    if added > _MAX_ADDED:
        raise UnsupportedModelError(
            f"{what} puts {added} characters or tokens around a text; at most {_MAX_ADDED} are "
            "supported"
        )


def _leaves(step: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of sequences in sequences; their depth is bounded by the library's parser."""
    waiting = [step]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            yield step
            waiting += step.values()
        elif isinstance(step, list):
            waiting += step


def _replacement_growth(step: Mapping[str, Any], what: str) -> float:
    pattern, content = step["pattern"], step["content"]
    if pattern.get("String") == "":
        raise UnsupportedModelError(f"{what} replaces the empty string")
    # An expression may match between any two characters, which then stay.
    shortest = len(pattern["String"]) if "String" in pattern else 0
    return max(1.0, len(content) / shortest if shortest else 1.0 + len(content))


def _table_growth(charsmap: str) -> float:
    """Of sentencepiece's table: the size of a trie (u32), the trie, and texts that end in zeros."""
    data = base64.b64decode(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    longest = max(map(len, texts.split(b"\0")))
    return 1.0 if longest <= _MAX_TABLE_BYTES else float(longest)


def _check_frame(pieces: list[Mapping[str, Any]], what: str) -> int:
    """Tokens that the frame puts around a text."""
    texts = [piece for piece in pieces if "Sequence" in piece]
    if len(texts) != 1:
        raise UnsupportedModelError(f"{what} must hold the text once, got {short_repr(pieces)}")
    return len(pieces) - 1
