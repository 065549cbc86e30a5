"""The metadata that a conversion to GGUF writes for a folder's sentencepiece vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rapshee_engine.tokenizer.sentencepiece_model import PieceKind, read_sentencepiece

__all__ = ["gguf_metadata"]


def gguf_metadata(folder: Path, **changes: Any) -> dict[str, Any]:
    """``tokenizer.ggml.*`` of the folder's ``tokenizer.model`` and settings, with ``changes``;
    None takes an entry out."""
    model = read_sentencepiece((folder / "tokenizer.model").read_bytes(), "tokenizer.model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    rows = dict(enumerate(zip(model.pieces, model.scores, model.kinds, strict=True)))
    for key, token in settings.get("added_tokens_decoder", {}).items():
        kind = PieceKind.CONTROL if token["special"] else PieceKind.USER_DEFINED
        if int(key) >= len(model.pieces):
            rows[int(key)] = (token["content"], -1000.0, kind)
    tokens, scores, kinds = zip(*(rows[i] for i in range(len(rows))), strict=True)
    entries = {
        "model": "llama",
        "tokens": [
            token.replace("▁", " ") if kind == PieceKind.USER_DEFINED else token
            for token, kind in zip(tokens, kinds, strict=True)
        ],
        "scores": list(scores),
        "token_type": [int(kind) for kind in kinds],
        "bos_token_id": tokens.index(model.bos_piece),
        "eos_token_id": tokens.index(model.eos_piece),
        "unknown_token_id": kinds.index(PieceKind.UNKNOWN),
        "add_bos_token": settings["add_bos_token"],
        "add_eos_token": settings["add_eos_token"],
        "add_space_prefix": model.add_dummy_prefix,
    }
    entries = {key: value for key, value in (entries | changes).items() if value is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
