"""A Hugging Face folder's ``tokenizer.model``, with what its settings add to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from rapshee_engine.errors import WeightFileError
from rapshee_engine.files import read_file
from rapshee_engine.tokenizer.sentencepiece_model import (
    PieceKind,
    SentencePieceModel,
    read_sentencepiece,
)
from rapshee_engine.tokenizer.sentencepiece_vocab import DummyPrefix, SentencePieceVocabulary

__all__ = ["vocabulary_from_sentencepiece"]

# Keys of ``tokenizer_config.json`` whose tokens are control tokens.
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_NAMED_LISTS = ("additional_special_tokens", "extra_special_tokens")
_MAX_FILE_BYTES = 1 << 25  # the largest known has 5 MB

# In `transformers` these are not legacy unless the settings say so; other classes are.
_MODERN_CLASSES = frozenset({"LlamaTokenizer", "LlamaTokenizerFast"})


def vocabulary_from_sentencepiece(
    file: Path, settings: Mapping[str, Any], added_tokens: Mapping[str, Any]
) -> tuple[SentencePieceVocabulary, str | None, str | None]:
    """The vocabulary, and the strings of the tokens that begin and end a text, where it has them.

    Args:
        file: the ``tokenizer.model``.
        settings: ``tokenizer_config.json`` over ``special_tokens_map.json``.
        added_tokens: ``added_tokens.json``.

    Raises:
        WeightFileError: a file is broken, or does not fit the others.
        UnsupportedModelError: the model needs something that is not implemented.
    """
    model = read_sentencepiece(read_file(file, _MAX_FILE_BYTES), str(file))
    settings = {"bos_token": model.bos_piece, "eos_token": model.eos_piece, **settings}
    added = _added_tokens(model, settings, added_tokens, str(file.parent))
    model = _without_renamed(model, added)
    ids = {token.content: token_id for token_id, token in added.items()}
    bos, eos = (_present(settings.get(key), ids) for key in ("bos_token", "eos_token"))
    # The classes of `transformers` document these defaults.
    first = [ids[bos]] if bos is not None and _flag(settings, "add_bos_token", True) else []
    last = [ids[eos]] if eos is not None and _flag(settings, "add_eos_token", False) else []
    vocabulary = SentencePieceVocabulary(
        model, added, prefix=_prefix(model, settings), first=first, last=last, source=str(file)
    )
    return vocabulary, bos, eos


def _added_tokens(
    model: SentencePieceModel,
    settings: Mapping[str, Any],
    added_tokens: Mapping[str, Any],
    folder: str,
) -> dict[int, AddedToken]:
    """Control pieces of the model, then the folder's own tokens, which overrule them."""
    ids = {piece: token_id for token_id, piece in enumerate(model.pieces)}
    added = {
        token_id: AddedToken(model.pieces[token_id], special=True, normalized=False)
        for token_id, kind in enumerate(model.kinds)
        if kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)
    }
    for content, token_id in added_tokens.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise WeightFileError(folder, f"added_tokens.json: id of {content!r} is {token_id!r}")
        added.setdefault(token_id, AddedToken(content, special=False, normalized=True))
    for key, entry in _decoder_entries(settings, folder):
        added[key] = entry
    ids |= {token.content: token_id for token_id, token in added.items()}
    for entry in _named_entries(settings):
        token = _token(entry)
        # A token that the vocabulary lacks would have no row in the model.
        if token is not None and (token_id := ids.get(token.content)) is not None:
            flags = added.get(token_id, token).__getstate__()
            added[token_id] = AddedToken(token.content, **_flags(flags | {"special": True}))
    return added


def _decoder_entries(settings: Mapping[str, Any], folder: str) -> Iterator[tuple[int, AddedToken]]:
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, Mapping):
        raise WeightFileError(folder, "tokenizer_config.json: added_tokens_decoder is no object")
    for key, entry in entries.items():
        token = _token(entry)
        if not key.isdecimal() or len(key) > 9 or token is None:
            raise WeightFileError(
                folder, f"tokenizer_config.json: added_tokens_decoder has {key!r}: {entry!r}"
            )
        yield int(key), token


def _named_entries(settings: Mapping[str, Any]) -> Iterator[Any]:
    for key in _NAMED_TOKENS:
        yield settings.get(key)
    for key in _NAMED_LISTS:
        entries = settings.get(key)
        if isinstance(entries, Mapping):
            yield from entries.values()
        elif isinstance(entries, list):
            yield from entries


def _token(entry: object) -> AddedToken | None:
    """An entry is a string, or an object with ``content`` and flags."""
    if isinstance(entry, str):
        return AddedToken(entry, special=True, normalized=False)
    if isinstance(entry, Mapping) and isinstance(entry.get("content"), str):
        return AddedToken(entry["content"], **_flags(entry))
    return None


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    names = ("single_word", "lstrip", "rstrip", "special")
    flags = {name: entry.get(name) is True for name in names}
    return {**flags, "normalized": bool(entry.get("normalized", not flags["special"]))}


def _present(entry: object, ids: Mapping[str, int]) -> str | None:
    token = _token(entry)
    return token.content if token is not None and token.content in ids else None


def _without_renamed(
    model: SentencePieceModel, added: Mapping[int, AddedToken]
) -> SentencePieceModel:
    """A piece that the folder gives another string is not found in text by its old one."""
    found = (PieceKind.NORMAL, PieceKind.USER_DEFINED, PieceKind.UNUSED)
    kinds = [
        PieceKind.CONTROL if kind in found and i in added and added[i].content != piece else kind
        for i, (piece, kind) in enumerate(zip(model.pieces, model.kinds, strict=True))
    ]
    return replace(model, kinds=kinds)


def _flag(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    value = settings.get(key)
    return default if value is None else bool(value)


def _prefix(model: SentencePieceModel, settings: Mapping[str, Any]) -> DummyPrefix:
    if not model.add_dummy_prefix or not _flag(settings, "add_prefix_space", True):
        return DummyPrefix.NEVER
    modern = settings.get("tokenizer_class") in _MODERN_CLASSES
    return DummyPrefix.EACH if _flag(settings, "legacy", not modern) else DummyPrefix.FIRST
