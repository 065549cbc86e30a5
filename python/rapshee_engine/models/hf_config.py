"""Hugging Face's ``config.json`` -> `ModelConfig`.

Every key is either honoured, known to be without effect on the results, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rapshee_engine.models.config import ModelConfig, RopeConfig
from rapshee_engine.models.fields import Fields
from rapshee_engine.models.hf_families import HF_FAMILIES, HfFamily
from rapshee_engine.models.hf_rope import HfRope, flat_rope
from rapshee_engine.models.known_keys import HF_HARMLESS, HF_HONOURED, HF_NEUTRAL
from rapshee_engine.models.limits import (
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_SIZE,
    check_groups,
    read_head_dim,
)

__all__ = ["config_from_hf"]

_ACTIVATIONS = MappingProxyType({"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"})


def config_from_hf(
    config: Mapping[str, Any], source: str, *, context_length: int | None = None
) -> ModelConfig:
    """Hyper-parameters of a Hugging Face ``config.json``.

    Some rotary scalings depend on a length, which transformers takes from what it computes at the
    moment. Here it is ``context_length`` for all that the model computes. With ``dynamic``,
    frequencies are the plain ones up to the trained length, beyond it those that transformers has
    at exactly that length. With ``longrope``, the short factors apply up to the original length,
    the long ones beyond.

    Args:
        config: the parsed object.
        source: its path, for messages.
        context_length: tokens that the model is loaded for; None: as many as it was made for. More
            than that count for ``dynamic`` alone, up to ``factor`` times the trained length.

    Raises:
        WeightFileError: a value is missing or cannot be.
        UnsupportedModelError: an architecture, key or value that is not implemented.
    """
    fields = Fields(config, source)
    model_type = fields.choice("model_type", tuple(HF_FAMILIES))
    family = HF_FAMILIES[model_type]
    _check_keys(fields, family)
    hidden_size = fields.integer("hidden_size", 1, MAX_SIZE)
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    head_dim = read_head_dim(fields, "head_dim", hidden_size, num_heads, family.head_dim)
    attention_bias = fields.flag("attention_bias", default=False)
    max_position, ropes = _ropes(fields, family, head_dim, context_length)
    common = {
        "query_scale": head_dim**-0.5,
        **family.mechanisms,
        **(family.scales(fields) if family.scales else {}),
    }
    return ModelConfig(
        architecture=model_type,
        vocab_size=fields.integer("vocab_size", 1, MAX_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_SIZE),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, family, num_heads),
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=fields.positive("rms_norm_eps", family.rms_norm_eps),
        activation=_ACTIVATIONS[
            fields.choice(family.activation_key, _ACTIVATIONS, family.activation)
        ],
        tie_embeddings=fields.flag("tie_word_embeddings", default=family.tie_embeddings),
        qkv_bias=attention_bias or family.qkv_bias,
        out_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
        ropes=ropes,
        layers=family.layers(fields, fields.integer("num_hidden_layers", 1, MAX_LAYERS)),
        **common,
    )


def _check_keys(fields: Fields, family: HfFamily) -> None:
    own = family.keys | family.harmless
    fields.require_known(
        HF_HONOURED | HF_HARMLESS | HF_NEUTRAL.keys() | own | family.neutral.keys()
    )
    neutral = {**HF_NEUTRAL, **family.neutral}
    for key in ("attention_bias", "mlp_bias"):
        if not getattr(family, key):
            neutral[key] = False
    fields.require_neutral({key: value for key, value in neutral.items() if key not in own})


def _num_kv_heads(fields: Fields, family: HfFamily, num_heads: int) -> int:
    default = family.num_kv_heads or num_heads
    if fields.is_listed("num_key_value_heads"):  # null has a meaning of its own: one for each head
        default = num_heads
    num_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, default)
    check_groups(fields, "num_key_value_heads", num_heads, num_kv_heads)
    return num_kv_heads


def _ropes(
    fields: Fields, family: HfFamily, head_dim: int, asked: int | None
) -> tuple[int, tuple[RopeConfig, ...]]:
    """Context of the model, and its rotary embeddings."""
    trained = fields.integer("max_position_embeddings", 1, MAX_CONTEXT, family.max_position)

    def read(section: Fields, theta_key: str, default_theta: float) -> HfRope:
        return HfRope.read(
            fields,
            section,
            types=family.rope_types,
            theta_key=theta_key,
            default_theta=default_theta,
            trained_length=trained,
            default_original=family.original_length,
        )

    if family.local_theta is None:
        ropes = [read(flat_rope(fields), "rope_theta", family.rope_theta)]
    else:
        of_all, of_windows = _sections_by_layer_type(fields)
        ropes = [read(of_all, "rope_theta", family.rope_theta)]
        ropes.append(read(of_windows, "rope_local_base_freq", family.local_theta))
    max_position = ropes[0].max_position(asked)
    length = min(asked or max_position, max_position)
    partial = family.partial_rotation
    return max_position, tuple(r.config(head_dim, length, may_be_partial=partial) for r in ropes)


def _sections_by_layer_type(fields: Fields) -> tuple[Fields, Fields]:
    """Rotary settings of layers that see everything, and of those with a window."""
    if not fields.has("rope_parameters"):
        return fields.section("rope_scaling"), Fields({}, fields.source)
    by_type = fields.section("rope_parameters")
    if fields.has("rope_scaling"):
        raise fields.unsupported("rope_scaling", "null beside rope_parameters")
    by_type.require_known({"full_attention", "sliding_attention"})
    return by_type.section("full_attention"), by_type.section("sliding_attention")
