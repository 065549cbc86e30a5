"""The BPE vocabulary inside a GGUF file, as a `Tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.tokenizer.pre_tokenizers import PreTokenizer, pre_tokenizer
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["chat_template_from_gguf", "tokenizer_from_gguf"]

_PREFIX = "tokenizer.ggml."

# Control tokens that end a turn. Files often name only one in their metadata; llama.cpp finds the
# others by these strings too (src/llama-vocab.cpp, end-of-turn and end-of-generation tokens).
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")


class _TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type`` (GGUF specification) that change anything here."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


def chat_template_from_gguf(metadata: Mapping[str, Any]) -> str | None:
    """Jinja source of the file's chat template, if it has one."""
    template = metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Build the tokenizer that the metadata of a GGUF file describes.

    Args:
        metadata: the file's key-value pairs.
        source: the file's name, for messages.

    Raises:
        UnsupportedModelError: a kind of vocabulary or a pre-tokenizer that is not implemented.
        WeightFileError: entries are missing or do not fit each other.
    """
    kind = metadata.get(_PREFIX + "model")
    if kind != "gpt2":
        raise UnsupportedModelError(
            f"{source}: tokenizer.ggml.model {kind!r} is not supported; supported: 'gpt2' "
            "(byte-level BPE). A Hugging Face folder with a tokenizer.json works instead"
        )
    tokens = _strings(metadata, "tokens", source)
    types = metadata.get(_PREFIX + "token_type", [_TokenType.NORMAL] * len(tokens))
    if not isinstance(types, Sequence) or len(types) != len(tokens):
        raise WeightFileError(source, f"{_PREFIX}token_type must be a list of {len(tokens)} types")
    rule = pre_tokenizer(str(metadata.get(_PREFIX + "pre", "default")), source)
    hf = _bpe(tokens, _strings(metadata, "merges", source), rule, source)
    _add_tokens(hf, tokens, types)
    bos = _token_id(metadata, "bos_token_id", len(tokens), source)
    eos = _token_id(metadata, "eos_token_id", len(tokens), source)
    add_bos = bool(metadata.get(_PREFIX + "add_bos_token", rule.add_bos))
    add_eos = bool(metadata.get(_PREFIX + "add_eos_token", False))
    _frame(hf, tokens, bos if add_bos else None, eos if add_eos else None)
    return Tokenizer(
        hf,
        source=source,
        bos_token=None if bos is None else tokens[bos],
        eos_token=None if eos is None else tokens[eos],
        eos_token_ids=_eos_ids(metadata, tokens, types, source),
    )


def _strings(metadata: Mapping[str, Any], key: str, source: str) -> Sequence[str]:
    values = metadata.get(_PREFIX + key)
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise WeightFileError(source, f"{_PREFIX}{key} is missing or empty")
    if not all(isinstance(value, str) for value in values):
        raise WeightFileError(source, f"{_PREFIX}{key} must be a list of strings")
    return values


def _token_id(metadata: Mapping[str, Any], key: str, size: int, source: str) -> int | None:
    token_id = metadata.get(_PREFIX + key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < size:
        raise WeightFileError(
            source, f"{_PREFIX}{key} is {token_id!r}; the vocabulary has {size} tokens"
        )
    return token_id


def _bpe(
    tokens: Sequence[str], merges: Sequence[str], rule: PreTokenizer, source: str
) -> tokenizers.Tokenizer:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise WeightFileError(source, f"{len(tokens) - len(vocab)} tokens occur twice")
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space:
            raise WeightFileError(source, f"merge {merge!r} is not a pair of tokens")
        pairs.append((left, right))
    try:
        model = models.BPE(vocab, pairs, ignore_merges=rule.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise WeightFileError(source, f"{_PREFIX}merges: {error}") from None
    hf = tokenizers.Tokenizer(model)
    if rule.normalizer() is not None:
        hf.normalizer = rule.normalizer()
    hf.pre_tokenizer = rule.rule()
    hf.decoder = decoders.ByteLevel()
    return hf


def _add_tokens(hf: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control and user-defined tokens are found in the text before it is cut into words."""
    special, plain = [], []
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_TokenType.CONTROL, _TokenType.UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif token_type == _TokenType.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    hf.add_special_tokens(special)
    hf.add_tokens(plain)


def _frame(
    hf: tokenizers.Tokenizer, tokens: Sequence[str], bos: int | None, eos: int | None
) -> None:
    """Put ``bos`` before and ``eos`` behind each encoded text."""
    if bos is None and eos is None:
        return
    pieces = [f"{tokens[bos]}:0"] if bos is not None else []
    pieces.append("$A:0")
    pieces += [f"{tokens[eos]}:0"] if eos is not None else []
    hf.post_processor = processors.TemplateProcessing(
        single=pieces,
        pair=None,
        special_tokens=[(tokens[i], i) for i in {bos, eos} if i is not None],
    )


def _eos_ids(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], source: str
) -> set[int]:
    named = (
        _token_id(metadata, key, len(tokens), source)
        for key in ("eos_token_id", "eot_token_id", "eom_token_id")
    )
    ids = {token_id for token_id in named if token_id is not None}
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type == _TokenType.CONTROL and token in _TURN_ENDS:
            ids.add(token_id)
    return ids
