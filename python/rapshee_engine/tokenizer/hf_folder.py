"""The tokenizer and the chat template of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from rapshee_engine.errors import WeightFileError
from rapshee_engine.tokenizer.sentencepiece_folder import vocabulary_from_sentencepiece
from rapshee_engine.tokenizer.tokenizer import Tokenizer
from rapshee_engine.tokenizer.vocabulary import LibraryVocabulary, Vocabulary

__all__ = ["chat_template_from_folder", "tokenizer_from_folder"]

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def tokenizer_from_folder(path: Path) -> Tokenizer:
    """Read ``tokenizer.json``, or else ``tokenizer.model``, and, where they exist,
    ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``,
    ``generation_config.json`` and ``config.json``.

    Raises:
        WeightFileError: a file is missing or broken.
        UnsupportedModelError: the tokenizer's decoder or kind is not implemented.
    """
    settings = {
        **_read_json(path / "special_tokens_map.json"),
        **_read_json(path / "tokenizer_config.json"),
    }
    vocabulary: Vocabulary
    if (path / "tokenizer.json").is_file():
        vocabulary, bos, eos = _from_library(path / "tokenizer.json", settings)
    elif (path / "tokenizer.model").is_file():
        added = _read_json(path / "added_tokens.json")
        vocabulary, bos, eos = vocabulary_from_sentencepiece(
            path / "tokenizer.model", settings, added
        )
    else:
        raise WeightFileError(
            str(path / "tokenizer.json"), "no such file, and no tokenizer.model beside it"
        )
    return Tokenizer(
        vocabulary,
        bos_token=bos,
        eos_token=eos,
        eos_token_ids=_eos_ids(path, None if eos is None else vocabulary.token_id(eos)),
    )


def _from_library(
    file: Path, settings: Mapping[str, Any]
) -> tuple[LibraryVocabulary, str | None, str | None]:
    """The vocabulary, and the strings of the tokens that begin and end a text."""
    hf = _load(file)
    named = {key: _content(settings.get(key)) for key in _NAMED_TOKENS}
    extra = settings.get("additional_special_tokens") or []
    _mark_special(hf, [*named.values(), *map(_content, extra)])
    bos, eos = (_in_vocab(hf, named[key]) for key in ("bos_token", "eos_token"))
    return LibraryVocabulary(hf, str(file)), bos, eos


def chat_template_from_folder(path: Path) -> str | None:
    """Jinja source of the folder's chat template, if it has one.

    It is ``chat_template.jinja``, else the entry of ``chat_template.json``, else that of
    ``tokenizer_config.json``; of several, the one named ``default``.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WeightFileError(str(file), str(error)) from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _read_json(path / name).get("chat_template")
        if isinstance(template, list):
            by_name = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = by_name.get("default")
        if isinstance(template, str):
            return template
    return None


def _load(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the library derives from BaseException
        raise WeightFileError(str(file), f"not a readable tokenizer: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightFileError(str(file), f"not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightFileError(str(file), "expected a JSON object")
    return value


def _content(token: object) -> str | None:
    """A token entry is a string or an object with its ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _in_vocab(hf: tokenizers.Tokenizer, token: str | None) -> str | None:
    return token if token is not None and hf.token_to_id(token) is not None else None


def _mark_special(hf: tokenizers.Tokenizer, named: list[str | None]) -> None:
    """Tokens that the settings name are control tokens even where ``tokenizer.json`` does not say
    so. One that the vocabulary lacks would have no row in the model, so it is left out."""
    special = {t.content for t in hf.get_added_tokens_decoder().values() if t.special}
    new = {t for t in (_in_vocab(hf, token) for token in named) if t is not None} - special
    hf.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(new)])


def _eos_ids(path: Path, eos_token_id: int | None) -> set[int]:
    """The tokenizer's own, and those of ``generation_config.json``, else of ``config.json``."""
    ids = set() if eos_token_id is None else {eos_token_id}
    for name in ("generation_config.json", "config.json"):
        value = _read_json(path / name).get("eos_token_id")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise WeightFileError(
                str(path / name), f"eos_token_id must be an integer or a list of them: {value!r}"
            )
        return ids | set(values)
    return ids
