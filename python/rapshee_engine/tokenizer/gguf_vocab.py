"""The tokenizer of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.files import short_repr
from rapshee_engine.tokenizer.chat_template import check_template_size
from rapshee_engine.tokenizer.gguf_bpe import byte_level_vocabulary
from rapshee_engine.tokenizer.gguf_fields import VocabularyFields
from rapshee_engine.tokenizer.gguf_sentencepiece import sentencepiece_vocabulary
from rapshee_engine.tokenizer.pre_tokenizers import pre_tokenizer
from rapshee_engine.tokenizer.sentencepiece_model import PieceKind
from rapshee_engine.tokenizer.tokenizer import Tokenizer
from rapshee_engine.tokenizer.vocabulary import Vocabulary

__all__ = ["chat_template_from_gguf", "tokenizer_from_gguf"]

_KINDS = {"gpt2": "byte-level BPE", "llama": "sentencepiece BPE"}

# Control tokens that end a turn. Files often name only one in their metadata; llama.cpp finds the
# others by these strings too (src/llama-vocab.cpp, end-of-turn and end-of-generation tokens).
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")


def chat_template_from_gguf(metadata: Mapping[str, Any], source: str) -> str | None:
    """Jinja source of the file's chat template, if it has one.

    Raises:
        WeightFileError: it is no string, or too long for a template.
    """
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise WeightFileError(
            source, f"tokenizer.chat_template must be a string, got {short_repr(template)}"
        )
    return check_template_size(template, source)


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Build the tokenizer that the metadata of a GGUF file describes.

    Args:
        metadata: the file's key-value pairs.
        source: the file's name, for messages.

    Raises:
        UnsupportedModelError: a kind of vocabulary or a pre-tokenizer that is not implemented.
        WeightFileError: entries are missing or do not fit each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in _KINDS:
        supported = ", ".join(f"{name!r} ({what})" for name, what in _KINDS.items())
        raise UnsupportedModelError(
            f"{source}: tokenizer.ggml.model {short_repr(kind)} is not supported; supported: "
            f"{supported}. A Hugging Face folder with a tokenizer.json works instead"
        )
    if kind == "llama":
        return _sentencepiece(metadata, source)
    return _byte_level(metadata, source)


def _byte_level(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    fields = VocabularyFields(metadata, source)
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str):
        raise fields.error("pre", f"must be a string, got {short_repr(name)}")
    rule = pre_tokenizer(name, source)
    bos, eos = fields.token_id("bos_token_id"), fields.token_id("eos_token_id")
    first, last = _frame(fields, bos, eos, add_bos=rule.add_bos)
    vocabulary = byte_level_vocabulary(fields, rule, first=first, last=last)
    return _tokenizer(vocabulary, fields, bos, eos)


def _sentencepiece(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    fields = VocabularyFields(metadata, source)
    # Llama's ids, for files that do not name them.
    bos, eos = fields.token_id("bos_token_id", 1), fields.token_id("eos_token_id", 2)
    first, last = _frame(fields, bos, eos, add_bos=True)
    vocabulary = sentencepiece_vocabulary(fields, metadata, first=first, last=last)
    return _tokenizer(vocabulary, fields, bos, eos)


def _frame(
    fields: VocabularyFields, bos: int | None, eos: int | None, *, add_bos: bool
) -> tuple[list[int], list[int]]:
    """Ids to put before and behind a text."""
    first = [bos] if bos is not None and fields.flag("add_bos_token", add_bos) else []
    last = [eos] if eos is not None and fields.flag("add_eos_token", False) else []
    return first, last


def _tokenizer(
    vocabulary: Vocabulary, fields: VocabularyFields, bos: int | None, eos: int | None
) -> Tokenizer:
    return Tokenizer(
        vocabulary,
        bos_token=None if bos is None else fields.tokens[bos],
        eos_token=None if eos is None else fields.tokens[eos],
        eos_token_ids=_eos_ids(fields, eos),
    )


def _eos_ids(fields: VocabularyFields, eos: int | None) -> set[int]:
    named = (eos, fields.token_id("eot_token_id"), fields.token_id("eom_token_id"))
    ids = {token_id for token_id in named if token_id is not None}
    for token_id, (token, kind) in enumerate(zip(fields.tokens, fields.types, strict=True)):
        if kind == PieceKind.CONTROL and token in _TURN_ENDS:
            ids.add(token_id)
    return ids
