"""A tiny random model that can chat: a token a byte, with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reference.fake_runner import CHAT_TEMPLATE, EOS, make_library_tokenizer, make_tokenizer
from reference.tiny_llama import make_config, make_weights, write_hf_folder

__all__ = ["write_chat_folder"]


def write_chat_folder(folder: Path, **changes: Any) -> Path:
    """Write it as a Hugging Face folder; ``changes`` are fields of its ``config.json``."""
    tokenizer = make_tokenizer()
    fields = {"vocab_size": tokenizer.vocab_size, "eos_token_id": EOS, **changes}
    config = make_config(**fields)
    write_hf_folder(folder, config, make_weights(config, seed=9), dtype="bf16")
    make_library_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
