"""The sentencepiece vocabulary inside a GGUF file (``tokenizer.ggml.model`` is ``llama``).

Such a file has the pieces of a sentencepiece BPE model, but not its settings; those are what
llama.cpp takes for granted (``src/llama-vocab.cpp``, SPM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from rapshee_engine.tokenizer.gguf_fields import VocabularyFields
from rapshee_engine.tokenizer.sentencepiece_model import PieceKind, SentencePieceModel
from rapshee_engine.tokenizer.sentencepiece_vocab import DummyPrefix, SentencePieceVocabulary

__all__ = ["sentencepiece_vocabulary"]

_SPACE = "\u2581"


def sentencepiece_vocabulary(
    fields: VocabularyFields,
    metadata: Mapping[str, Any],
    *,
    first: Sequence[int],
    last: Sequence[int],
) -> SentencePieceVocabulary:
    """
    Args:
        first, last: ids put around a text.

    Raises:
        WeightFileError: entries are missing, or do not fit each other.
    """
    kinds = _kinds(fields)
    model = SentencePieceModel(
        pieces=[_piece(token, i, kinds[i]) for i, token in enumerate(fields.tokens)],
        scores=fields.scores(),
        kinds=kinds,
        byte_fallback=PieceKind.BYTE in kinds,
        remove_extra_whitespaces=fields.flag("remove_extra_whitespaces", False),
        charsmap=fields.octets("precompiled_charsmap"),
    )
    prefix = DummyPrefix.EACH if fields.flag("add_space_prefix", True) else DummyPrefix.NEVER
    added = {PieceKind.UNKNOWN, PieceKind.CONTROL}
    # The model finds user-defined tokens itself, but puts no prefix behind them.
    if prefix is DummyPrefix.EACH:
        added.add(PieceKind.USER_DEFINED)
    return SentencePieceVocabulary(
        model,
        _added(fields, added, str(metadata.get("general.name", ""))),
        prefix=prefix,
        first=first,
        last=last,
        source=fields.source,
    )


def _piece(token: str, token_id: int, kind: int) -> str:
    """The piece of a token. Files have user-defined tokens as they are in text, with spaces."""
    if kind == PieceKind.USER_DEFINED:
        return token.replace(" ", _SPACE)
    return token or f"[EMPTY_{token_id}]"


def _kinds(fields: VocabularyFields) -> list[int]:
    """Kinds of the pieces, of which exactly one is for unknown characters."""
    kinds = list(fields.types)
    unknown = fields.token_id("unknown_token_id")
    if unknown is None:
        unknown = kinds.index(PieceKind.UNKNOWN) if PieceKind.UNKNOWN in kinds else 0
    if kinds[unknown] in (PieceKind.BYTE, PieceKind.USER_DEFINED):
        raise fields.error("unknown_token_id", f"is {unknown}, a token of type {kinds[unknown]}")
    for token_id, kind in enumerate(kinds):
        if token_id == unknown:
            kinds[token_id] = PieceKind.UNKNOWN
        elif kind == PieceKind.UNKNOWN or not fields.tokens[token_id]:
            kinds[token_id] = PieceKind.CONTROL
    return kinds


def _added(fields: VocabularyFields, kinds: set[PieceKind], name: str) -> dict[int, AddedToken]:
    """Tokens of these kinds, which are found in a text before the model sees it."""
    # Files do not say which tokens swallow the white space after them. Like llama.cpp, this goes by
    # the model's name: those of Phi-3 do, three excepted.
    swallows = any(family in name.lower() for family in ("phi-3", "phi3"))
    return {
        token_id: AddedToken(
            token,
            special=kind != PieceKind.USER_DEFINED,
            normalized=False,
            rstrip=swallows and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token_id, (token, kind) in enumerate(zip(fields.tokens, fields.types, strict=True))
        if kind in kinds and token
    }
