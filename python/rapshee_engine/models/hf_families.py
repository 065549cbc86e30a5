"""The families of Hugging Face: what each ``model_type`` means.

Checked against ``configuration_*.py`` and ``modeling_*.py`` of transformers, for each family, and
against the ``config.json`` of published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from rapshee_engine.models.fields import Fields
from rapshee_engine.models.hf_layers import (
    ReadLayers,
    alternating_layers,
    equal_layers,
    gemma3_layers,
    plain_layers,
    qwen_layers,
    smollm3_layers,
)
from rapshee_engine.models.hf_rope import HF_ROPE_TYPES
from rapshee_engine.models.limits import MAX_SIZE

__all__ = ["HF_FAMILIES", "HfFamily"]

ReadScales = Callable[[Fields], Mapping[str, float]]
"""fields -> fields of `ModelConfig` beyond the common ones."""


def _gemma_scales(fields: Fields) -> Mapping[str, float]:
    return {
        # As transformers has it in float32; in bfloat16 it rounds the root.
        "embed_scale": fields.integer("hidden_size", 1, MAX_SIZE) ** 0.5,
        "query_scale": fields.positive("query_pre_attn_scalar", 256) ** -0.5,
    }


def _gemma2_scales(fields: Fields) -> Mapping[str, float]:
    return {
        **_gemma_scales(fields),
        "attn_softcap": fields.cap("attn_logit_softcapping", 50.0),
        "final_softcap": fields.cap("final_logit_softcapping", 30.0),
    }


def _gemma3_scales(fields: Fields) -> Mapping[str, float]:
    return {
        **_gemma_scales(fields),
        "final_softcap": fields.cap("final_logit_softcapping", 0.0),
    }


def _granite_scales(fields: Fields) -> Mapping[str, float]:
    return {
        "embed_scale": fields.positive("embedding_multiplier", 1.0),
        "query_scale": fields.positive("attention_multiplier", 1.0),
        "residual_scale": fields.positive("residual_multiplier", 1.0),
        "logit_scale": 1.0 / fields.positive("logits_scaling", 1.0),
    }


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HfFamily:
    """What a ``model_type`` means, and what transformers assumes for keys that are left out.

    Attributes:
        mechanisms: fields of `ModelConfig` that are the same for the whole family.
        scales: those that keys of its own give.
        layers: windows and rotations of its layers.
        activation_key: of the activation; ``activation`` where it is absent.
        attention_bias, mlp_bias: whether such a key may say true.
        qkv_bias: whether queries, keys and values have biases that no key tells of.
        num_kv_heads: None: as many as heads.
        head_dim: None: the hidden size's share of a head.
        rope_types: ``rope_type`` -> rule, see `hf_rope`.
        partial_rotation: whether ``partial_rotary_factor`` is read.
        original_length: of scaled rotations, where none is stated; None: the trained length.
        local_theta: base of a second rotary embedding, that of layers with a window.
        keys: honoured, that only some families have.
        harmless: as in `known_keys`.
        neutral: as in `known_keys`.
    """

    mechanisms: Mapping[str, Any] = field(default_factory=_nothing)
    scales: ReadScales | None = None
    layers: ReadLayers = plain_layers
    activation_key: str = "hidden_act"
    activation: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    qkv_bias: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position: int = 2048
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_types: Mapping[str, str] = field(default_factory=lambda: HF_ROPE_TYPES)
    partial_rotation: bool = False
    original_length: int | None = None
    local_theta: float | None = None
    keys: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    neutral: Mapping[str, Any] = field(default_factory=_nothing)


_WINDOW_KEYS = frozenset({"layer_types", "max_window_layers", "use_sliding_window"})
_GEMMA_KEYS = frozenset(
    {
        "final_logit_softcapping",
        "hidden_activation",
        "layer_types",
        "query_pre_attn_scalar",
    }
)
_GEMMA_HARMLESS = frozenset({"cache_implementation", "sliding_window_size"})
_GEMMA_NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {"hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": False}
)

HF_FAMILIES = MappingProxyType(
    {
        "llama": HfFamily(attention_bias=True, mlp_bias=True),
        "mistral": HfFamily(num_kv_heads=8, layers=equal_layers(4096), max_position=131_072),
        "qwen2": HfFamily(
            qkv_bias=True,
            num_kv_heads=32,
            layers=qwen_layers,
            max_position=32_768,
            keys=_WINDOW_KEYS,
            neutral=MappingProxyType({"use_mrope": False}),
        ),
        "qwen3": HfFamily(
            mechanisms=MappingProxyType({"qk_norm": "head"}),
            attention_bias=True,
            num_kv_heads=32,
            head_dim=128,
            layers=qwen_layers,
            max_position=32_768,
            keys=_WINDOW_KEYS,
        ),
        "gemma2": HfFamily(
            mechanisms=MappingProxyType({"post_norm": True, "norm_zero_centered": True}),
            scales=_gemma2_scales,
            layers=alternating_layers,
            activation_key="hidden_activation",
            activation="gelu_pytorch_tanh",
            attention_bias=True,
            num_kv_heads=4,
            head_dim=256,
            max_position=8192,
            tie_embeddings=True,
            keys=_GEMMA_KEYS | {"attn_logit_softcapping"},
            harmless=_GEMMA_HARMLESS,
            neutral=_GEMMA_NEUTRAL,
        ),
        "gemma3_text": HfFamily(
            mechanisms=MappingProxyType(
                {"post_norm": True, "norm_zero_centered": True, "qk_norm": "head"}
            ),
            scales=_gemma3_scales,
            layers=gemma3_layers,
            activation_key="hidden_activation",
            activation="gelu_pytorch_tanh",
            attention_bias=True,
            num_kv_heads=4,
            head_dim=256,
            max_position=131_072,
            tie_embeddings=True,
            rope_theta=1_000_000.0,
            local_theta=10_000.0,
            keys=_GEMMA_KEYS
            | {"_sliding_window_pattern", "rope_local_base_freq", "sliding_window_pattern"},
            # transformers stores a soft cap of the scores and does not apply it.
            harmless=_GEMMA_HARMLESS | {"attn_logit_softcapping"},
            neutral=_GEMMA_NEUTRAL,
        ),
        "phi3": HfFamily(
            layers=equal_layers(0),
            max_position=4096,
            rms_norm_eps=1e-5,
            rope_types=MappingProxyType(
                {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
            ),
            partial_rotation=True,
            original_length=4096,
            keys=frozenset({"partial_rotary_factor"}),
            harmless=frozenset({"auto_map", "embd_pdrop", "resid_pdrop"}),
            neutral=MappingProxyType(
                {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
            ),
        ),
        "smollm3": HfFamily(
            layers=smollm3_layers,
            attention_bias=True,
            mlp_bias=True,
            num_kv_heads=4,
            max_position=32_768,
            tie_embeddings=True,
            rope_theta=2_000_000.0,
            keys=(_WINDOW_KEYS - {"max_window_layers"})
            | {"no_rope_layer_interval", "no_rope_layers"},
            harmless=frozenset({"max_window_layers", "pretraining_tp"}),
        ),
        "olmo2": HfFamily(
            mechanisms=MappingProxyType({"pre_norm": False, "post_norm": True, "qk_norm": "row"}),
            attention_bias=True,
            rms_norm_eps=1e-5,
        ),
        "granite": HfFamily(
            scales=_granite_scales,
            attention_bias=True,
            mlp_bias=True,
            keys=frozenset(
                {
                    "attention_multiplier",
                    "embedding_multiplier",
                    "logits_scaling",
                    "residual_multiplier",
                }
            ),
        ),
    }
)
"""``model_type`` -> family."""
