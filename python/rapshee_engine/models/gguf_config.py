"""Metadata of a GGUF file -> `ModelConfig`.

Every key is either honoured, known to be without effect on the results, or refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rapshee_engine.errors import WeightFileError
from rapshee_engine.models.config import ModelConfig, RopeConfig
from rapshee_engine.models.fields import Fields
from rapshee_engine.models.gguf_families import GGUF_FAMILIES, GgufFamily, GgufSizes
from rapshee_engine.models.gguf_rope import GgufRope
from rapshee_engine.models.known_keys import GGUF_HARMLESS, GGUF_HONOURED, GGUF_NEUTRAL
from rapshee_engine.models.limits import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_SIZE,
    check_groups,
    read_head_dim,
)

__all__ = ["config_from_gguf"]


def config_from_gguf(
    metadata: Mapping[str, Any],
    *,
    tensor_shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Mapping[str, Sequence[float]],
    source: str,
    context_length: int | None = None,
) -> ModelConfig:
    """Hyper-parameters of a GGUF file.

    Args:
        metadata: the file's metadata.
        tensor_shapes: tensor name -> shape, outermost first. The file's tensors, not its metadata,
            say whether there are biases and an output projection, and how large the vocabulary is.
        rope_factors: values of those `gguf_rope.ROPE_FACTORS` that the file has.
        source: the file's path, for messages.
        context_length: tokens that the model is loaded for, which decide between LongRoPE's short
            and long factors for all that it computes; None: as many as it was made for.

    Raises:
        WeightFileError: a value is missing or cannot be.
        UnsupportedModelError: an architecture, key or value that is not implemented.
    """
    architecture = Fields(metadata, source).choice("general.architecture", tuple(GGUF_FAMILIES))
    family = GGUF_FAMILIES[architecture]
    fields = Fields(metadata, source, prefix=f"{architecture}.")
    fields.require_known(GGUF_HONOURED | GGUF_HARMLESS | GGUF_NEUTRAL.keys() | family.keys)
    fields.require_neutral(GGUF_NEUTRAL)
    sizes = _sizes(fields)
    num_kv_heads = fields.integer("attention.head_count_kv", 1, MAX_HEADS, sizes.num_heads)
    check_groups(fields, "attention.head_count_kv", sizes.num_heads, num_kv_heads)
    rope = GgufRope.read(
        fields,
        rope_factors,
        interleaved=family.interleaved_qk,
        may_be_partial=family.partial_rotation,
    )
    common = {
        "query_scale": sizes.head_dim**-0.5,
        **family.mechanisms,
        **(family.scales(fields, sizes) if family.scales else {}),
    }
    return ModelConfig(
        architecture=architecture,
        vocab_size=_vocab_size(fields, metadata, tensor_shapes),
        hidden_size=sizes.hidden_size,
        intermediate_size=fields.integer("feed_forward_length", 1, MAX_SIZE),
        num_heads=sizes.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=sizes.head_dim,
        max_position=rope.max_position(),
        rms_norm_eps=fields.positive("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in tensor_shapes,
        qkv_bias=_has_any(tensor_shapes, "attn_q.bias", "attn_qkv.bias"),
        out_bias=_has_any(tensor_shapes, "attn_output.bias"),
        mlp_bias=_has_any(tensor_shapes, "ffn_gate.bias"),
        interleaved_qk=family.interleaved_qk,
        ropes=_ropes(rope, family, sizes.head_dim, context_length),
        layers=family.layers(fields, sizes.num_layers),
        **common,
    )


def _sizes(fields: Fields) -> GgufSizes:
    hidden_size = fields.integer("embedding_length", 1, MAX_SIZE)
    num_heads = fields.integer("attention.head_count", 1, MAX_HEADS)
    head_dim = read_head_dim(fields, "attention.key_length", hidden_size, num_heads)
    fields.require_neutral({"attention.value_length": head_dim})
    num_layers = fields.integer("block_count", 1, MAX_LAYERS)
    return GgufSizes(hidden_size, num_heads, head_dim, num_layers)


def _has_any(tensor_shapes: Mapping[str, tuple[int, ...]], *names: str) -> bool:
    return any(f"blk.0.{name}" in tensor_shapes for name in names)


def _ropes(
    rope: GgufRope, family: GgufFamily, head_dim: int, asked: int | None
) -> tuple[RopeConfig, ...]:
    longest = rope.max_position()
    ropes = [rope.config(head_dim, min(asked or longest, longest))]
    if family.local_theta is not None:
        ropes.append(rope.local_config(head_dim, family.local_theta))
    return tuple(ropes)


def _vocab_size(
    fields: Fields, metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """Rows of the embedding; other statements of the size must agree."""
    embedding = "token_embd.weight"
    if embedding not in tensor_shapes:
        raise WeightFileError(fields.source, "is missing", tensor=embedding)
    vocab_size = tensor_shapes[embedding][0]
    if not 1 <= vocab_size <= MAX_SIZE:
        raise WeightFileError(
            fields.source, f"has {vocab_size} rows (1 to {MAX_SIZE})", tensor=embedding
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    stated = {"the metadata": fields.integer("vocab_size", 1, MAX_SIZE, vocab_size)}
    if isinstance(tokens, Collection):
        stated["the tokenizer"] = len(tokens)
    for who, size in stated.items():
        if size != vocab_size:
            raise WeightFileError(
                fields.source, f"has {vocab_size} rows, {who} {size} tokens", tensor=embedding
            )
    return vocab_size
