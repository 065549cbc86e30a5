"""The families of GGUF: what each architecture means.

Checked against ``llama-model.cpp``, ``models/*.cpp`` and ``conversion/*.py`` of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from rapshee_engine.models.config import LayerConfig
from rapshee_engine.models.fields import Fields
from rapshee_engine.models.limits import MAX_CONTEXT, MAX_LAYERS

__all__ = ["GGUF_FAMILIES", "GgufFamily", "GgufSizes"]

_SMOLLM3_INTERVAL = 4


@dataclass(frozen=True, slots=True)
class GgufSizes:
    """What scales and layers may follow from."""

    hidden_size: int
    num_heads: int
    head_dim: int
    num_layers: int


def _gemma_scales(sizes: GgufSizes, layers_of_27b: int) -> Mapping[str, float]:
    """No key tells the scale of queries: that of the 27B models differs."""
    share = sizes.hidden_size // sizes.num_heads
    width = share if sizes.num_layers == layers_of_27b else sizes.head_dim
    return {"embed_scale": sizes.hidden_size**0.5, "query_scale": width**-0.5}


def _gemma2_scales(fields: Fields, sizes: GgufSizes) -> Mapping[str, float]:
    return {
        **_gemma_scales(sizes, layers_of_27b=46),
        "attn_softcap": fields.positive("attn_logit_softcapping", 50.0),
        "final_softcap": fields.positive("final_logit_softcapping", 30.0),
    }


def _gemma3_scales(fields: Fields, sizes: GgufSizes) -> Mapping[str, float]:
    return {
        **_gemma_scales(sizes, layers_of_27b=62),
        "final_softcap": fields.cap("final_logit_softcapping", 0.0),
    }


def _granite_scales(fields: Fields, sizes: GgufSizes) -> Mapping[str, float]:
    return {
        "embed_scale": fields.positive("embedding_scale", 1.0),
        "query_scale": fields.positive("attention.scale", sizes.head_dim**-0.5),
        "residual_scale": fields.positive("residual_scale", 1.0),
        "logit_scale": 1.0 / fields.positive("logit_scale", 1.0),
    }


Layers = tuple[LayerConfig, ...]


def _plain_layers(fields: Fields, num_layers: int) -> Layers:
    fields.require_neutral({"attention.sliding_window": 0})
    return (LayerConfig(),) * num_layers


def _equal_layers(fields: Fields, num_layers: int) -> Layers:
    window = fields.integer("attention.sliding_window", 0, MAX_CONTEXT, 0)
    return (LayerConfig(window=window),) * num_layers


def _gemma2_layers(fields: Fields, num_layers: int) -> Layers:
    window = fields.integer("attention.sliding_window", 1, MAX_CONTEXT, 4096)
    slides = _slides(fields, num_layers, default_pattern=2)
    return tuple(LayerConfig(window=window if slide else 0) for slide in slides)


def _gemma3_layers(fields: Fields, num_layers: int) -> Layers:
    """Layers with a window have the second rope."""
    window = fields.integer("attention.sliding_window", 0, MAX_CONTEXT, 0)
    slides = _slides(fields, num_layers, default_pattern=6)
    return tuple(
        LayerConfig(rope=1, window=window) if window and slide else LayerConfig()
        for slide in slides
    )


def _smollm3_layers(fields: Fields, num_layers: int) -> Layers:
    fields.require_neutral({"attention.sliding_window": 0})
    return tuple(
        LayerConfig(rope=0 if (i + 1) % _SMOLLM3_INTERVAL else -1) for i in range(num_layers)
    )


def _granite_layers(fields: Fields, num_layers: int) -> Layers:
    fields.require_neutral({"attention.sliding_window": 0})
    # The key that elsewhere is a remark says here whether anything rotates.
    rotates = fields.flag("rope.scaling.finetuned", default=True)
    return (LayerConfig(rope=0 if rotates else -1),) * num_layers


def _slides(fields: Fields, num_layers: int, default_pattern: int) -> list[bool]:
    """Which layers have a window: a list of them, or all but every so manyth."""
    key = "attention.sliding_window_pattern"
    listed = fields.get(key)
    if isinstance(listed, list):
        if len(listed) != num_layers or not all(type(value) is bool for value in listed):
            raise fields.invalid(key, f"a number or {num_layers} booleans")
        return listed
    pattern = fields.integer(key, 1, MAX_LAYERS, default_pattern)
    return [(i + 1) % pattern != 0 for i in range(num_layers)]


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """What an architecture means.

    Attributes:
        mechanisms: fields of `ModelConfig` that are the same for the whole family.
        scales: those that keys of its own, or its sizes, give.
        layers: windows and rotations of its layers.
        interleaved_qk: Q and K rows that rotate together are neighbours, not half a head apart.
        partial_rotation: whether it rotates a part of a head alone, halves of it.
        local_theta: base of a second rotary embedding, that of layers with a window.
        keys: honoured, that only some families have.
    """

    mechanisms: Mapping[str, Any] = field(default_factory=_nothing)
    scales: Callable[[Fields, GgufSizes], Mapping[str, float]] | None = None
    layers: Callable[[Fields, int], Layers] = _plain_layers
    interleaved_qk: bool = False
    partial_rotation: bool = False
    local_theta: float | None = None
    keys: frozenset[str] = frozenset()


# The 1 that Gemma leaves out of its norms' weights is in the file's.
_GEMMA = {"post_norm": True, "activation": "gelu_tanh"}

GGUF_FAMILIES = MappingProxyType(
    {
        "llama": GgufFamily(interleaved_qk=True, layers=_equal_layers),
        "qwen2": GgufFamily(),
        "qwen3": GgufFamily(mechanisms=MappingProxyType({"qk_norm": "head"})),
        "gemma2": GgufFamily(
            mechanisms=MappingProxyType(_GEMMA),
            scales=_gemma2_scales,
            layers=_gemma2_layers,
            keys=frozenset(
                {
                    "attention.sliding_window_pattern",
                    "attn_logit_softcapping",
                    "final_logit_softcapping",
                }
            ),
        ),
        "gemma3": GgufFamily(
            mechanisms=MappingProxyType({**_GEMMA, "qk_norm": "head"}),
            scales=_gemma3_scales,
            layers=_gemma3_layers,
            local_theta=10_000.0,
            keys=frozenset(
                {
                    "attention.sliding_window_pattern",
                    "final_logit_softcapping",
                    "rope.freq_base_swa",
                }
            ),
        ),
        # llama.cpp leaves the window of Phi-3 out; transformers has it.
        "phi3": GgufFamily(layers=_equal_layers, partial_rotation=True),
        "smollm3": GgufFamily(interleaved_qk=True, layers=_smollm3_layers),
        "olmo2": GgufFamily(
            mechanisms=MappingProxyType({"pre_norm": False, "post_norm": True, "qk_norm": "row"})
        ),
        "granite": GgufFamily(
            interleaved_qk=True,
            scales=_granite_scales,
            layers=_granite_layers,
            keys=frozenset({"attention.scale", "embedding_scale", "logit_scale", "residual_scale"}),
        ),
    }
)
"""``general.architecture`` -> family."""
