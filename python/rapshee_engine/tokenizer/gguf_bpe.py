"""The byte-level BPE vocabulary inside a GGUF file (``tokenizer.ggml.model`` is ``gpt2``)."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from rapshee_engine.errors import WeightFileError
from rapshee_engine.files import short_repr
from rapshee_engine.tokenizer.gguf_fields import VocabularyFields
from rapshee_engine.tokenizer.pre_tokenizers import PreTokenizer
from rapshee_engine.tokenizer.sentencepiece_model import PieceKind
from rapshee_engine.tokenizer.vocabulary import LibraryVocabulary

__all__ = ["byte_level_vocabulary"]


def byte_level_vocabulary(
    fields: VocabularyFields,
    rule: PreTokenizer,
    *,
    first: Sequence[int],
    last: Sequence[int],
) -> LibraryVocabulary:
    """
    Args:
        rule: how text is cut into words.
        first, last: ids put around a text.

    Raises:
        WeightFileError: entries are missing, or do not fit each other.
    """
    model = _model(fields, ignore_merges=rule.ignore_merges)
    hf = tokenizers.Tokenizer(model)
    if rule.normalizer() is not None:
        hf.normalizer = rule.normalizer()
    hf.pre_tokenizer = rule.rule()
    hf.decoder = decoders.ByteLevel()
    _add_tokens(hf, fields)
    if first or last:
        hf.post_processor = _frame(fields.tokens, first, last)
    return LibraryVocabulary(hf, fields.source)


def _model(fields: VocabularyFields, *, ignore_merges: bool) -> models.BPE:
    tokens = fields.tokens
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise WeightFileError(fields.source, f"{len(tokens) - len(vocab)} tokens occur twice")
    pairs = []
    for merge in fields.strings("merges"):
        left, space, right = merge.partition(" ")
        if not space:
            raise WeightFileError(
                fields.source, f"merge {short_repr(merge)} is not a pair of tokens"
            )
        pairs.append((left, right))
    try:
        return models.BPE(vocab, pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise fields.error("merges", f"do not fit the tokens: {error!s:.300}") from None


def _add_tokens(hf: tokenizers.Tokenizer, fields: VocabularyFields) -> None:
    """Control and user-defined tokens are found in the text before it is cut into words."""
    special, plain = [], []
    for token, kind in zip(fields.tokens, fields.types, strict=True):
        if kind in (PieceKind.CONTROL, PieceKind.UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == PieceKind.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    hf.add_special_tokens(special)
    hf.add_tokens(plain)


def _frame(
    tokens: Sequence[str], first: Sequence[int], last: Sequence[int]
) -> processors.TemplateProcessing:
    """Puts ``first`` before and ``last`` behind each encoded text."""
    # Tokens go by their ids in the frame, whose syntax their strings might break.
    return processors.TemplateProcessing(
        single=[f"id{i}" for i in first] + ["$A"] + [f"id{i}" for i in last],
        pair=None,
        special_tokens=[
            {"id": f"id{i}", "ids": [i], "tokens": [tokens[i]]} for i in {*first, *last}
        ],
    )
