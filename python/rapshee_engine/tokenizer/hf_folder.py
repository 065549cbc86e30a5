"""The tokenizer and the chat template of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from rapshee_engine.errors import WeightFileError
from rapshee_engine.files import is_there, read_file, read_optional_json_object, short_repr
from rapshee_engine.tokenizer.chat_template import check_template_size
from rapshee_engine.tokenizer.library_checks import check_library_tokenizer
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
_EXTRA_TOKENS = "additional_special_tokens"
_MAX_TOKENIZER_BYTES = 256 << 20  # the largest of known models have 35 MB
_MAX_TEMPLATE_BYTES = 4 << 20


def tokenizer_from_folder(path: Path) -> Tokenizer:
    """Read ``tokenizer.json``, or else ``tokenizer.model``, and, where they exist,
    ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``,
    ``generation_config.json`` and ``config.json``.

    Raises:
        WeightFileError: a file is missing or broken.
        UnsupportedModelError: the tokenizer's decoder or kind is not implemented.
    """
    settings = _settings(path)
    vocabulary: Vocabulary
    if is_there(path / "tokenizer.json"):
        vocabulary, bos, eos = _from_library(path / "tokenizer.json", settings)
    elif is_there(path / "tokenizer.model"):
        added = read_optional_json_object(path / "added_tokens.json")
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


def _settings(path: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` over ``special_tokens_map.json``, their tokens checked."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        own = read_optional_json_object(path / name)
        for key in _NAMED_TOKENS:
            _check_token(path / name, key, own.get(key))
        extra = own.get(_EXTRA_TOKENS)
        if extra is not None and not isinstance(extra, list):
            raise WeightFileError(
                str(path / name), f"{_EXTRA_TOKENS} must be a list, got {short_repr(extra)}"
            )
        for token in extra or ():
            _check_token(path / name, _EXTRA_TOKENS, token)
        settings |= own
    return settings


def _check_token(file: Path, key: str, token: object) -> None:
    if token is not None and _content(token) is None:
        raise WeightFileError(str(file), f"{key} must be a token's string, got {short_repr(token)}")


def _content(token: object) -> str | None:
    """A token entry is a string or an object with its ``content``."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _from_library(
    file: Path, settings: Mapping[str, Any]
) -> tuple[LibraryVocabulary, str | None, str | None]:
    """The vocabulary, and the strings of the tokens that begin and end a text."""
    hf = _load(file)
    named = {key: _content(settings.get(key)) for key in _NAMED_TOKENS}
    _mark_special(hf, [*named.values(), *map(_content, settings.get(_EXTRA_TOKENS) or ())])
    bos, eos = (_in_vocab(hf, named[key]) for key in ("bos_token", "eos_token"))
    return LibraryVocabulary(hf, str(file)), bos, eos


def chat_template_from_folder(path: Path) -> str | None:
    """Jinja source of the folder's chat template, if it has one.

    It is ``chat_template.jinja``, else the entry of ``chat_template.json``, else that of
    ``tokenizer_config.json``; of several, the one named ``default``.
    """
    file = path / "chat_template.jinja"
    if is_there(file):
        try:
            return check_template_size(read_file(file, _MAX_TEMPLATE_BYTES).decode(), str(file))
        except UnicodeDecodeError as error:
            raise WeightFileError(str(file), str(error)) from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = path / name
        template = _template(file, read_optional_json_object(file).get("chat_template"))
        if template is not None:
            return check_template_size(template, str(file))
    return None


def _template(file: Path, value: Any) -> str | None:
    """A template, or the one named ``default`` of a list."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise WeightFileError(
            str(file), f"chat_template must be a string or a list, got {short_repr(value)}"
        )
    by_name = {}
    for entry in value:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) for key in ("name", "template")
        ):
            raise WeightFileError(
                str(file), f"chat_template must list names and templates, got {short_repr(entry)}"
            )
        by_name[entry["name"]] = entry["template"]
    return by_name.get("default")


def _load(file: Path) -> tokenizers.Tokenizer:
    data = read_file(file, _MAX_TOKENIZER_BYTES)
    try:
        hf = tokenizers.Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic inside the library derives from BaseException
        raise WeightFileError(str(file), f"not a readable tokenizer: {error!s:.300}") from None
    check_library_tokenizer(hf, str(file))
    return hf


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
        value = read_optional_json_object(path / name).get("eos_token_id")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise WeightFileError(
                str(path / name),
                f"eos_token_id must be an integer or a list of them: {short_repr(value)}",
            )
        return ids | set(values)
    return ids
