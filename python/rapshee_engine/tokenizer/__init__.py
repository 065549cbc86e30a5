"""Text to token ids and back: vocabularies, chat templates, incremental detokenization."""

from __future__ import annotations

from rapshee_engine.tokenizer.chat_template import ChatTemplate
from rapshee_engine.tokenizer.detokenizer import Detokenizer
from rapshee_engine.tokenizer.gguf_vocab import chat_template_from_gguf, tokenizer_from_gguf
from rapshee_engine.tokenizer.hf_folder import chat_template_from_folder, tokenizer_from_folder
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "Tokenizer",
    "chat_template_from_folder",
    "chat_template_from_gguf",
    "tokenizer_from_folder",
    "tokenizer_from_gguf",
]
