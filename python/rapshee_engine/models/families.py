"""Checkpoint hyper-parameters -> `ModelConfig`.

Every key is either honoured, known to be without effect on the results, or refused by name.
Checked against transformers' ``configuration_llama.py``, ``configuration_mistral.py``,
``configuration_qwen3.py``, ``modeling_qwen3.py`` and ``modeling_rope_utils.py``, and against
``gguf-py/gguf/constants.py``, ``llama-model.cpp`` and ``models/qwen3.cpp`` of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from rapshee_engine.errors import WeightFileError
from rapshee_engine.models.config import LayerConfig, ModelConfig, RopeConfig
from rapshee_engine.models.fields import Fields
from rapshee_engine.models.known_keys import (
    GGUF_HARMLESS,
    GGUF_HONOURED,
    GGUF_NEUTRAL,
    HF_HARMLESS,
    HF_HONOURED,
    HF_NEUTRAL,
)
from rapshee_engine.models.rope import (
    FloatArray,
    linear_inv_freq,
    llama3_inv_freq,
    plain_inv_freq,
    with_factors,
)

__all__ = ["config_from_gguf", "config_from_hf"]

# Far beyond any model; they keep products of two sizes within 64 bits and tables small.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12
_MAX_HEADS = 1 << 12
_MAX_HEAD_DIM = 1 << 12
_MAX_CONTEXT = 1 << 30

_ACTIVATIONS = ("silu",)
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_WINDOW = 4096


def _no_windows(fields: Fields, num_layers: int) -> tuple[int, ...]:
    if fields.has("sliding_window"):
        raise fields.unsupported("sliding_window", "null")
    return (0,) * num_layers


def _mistral_windows(fields: Fields, num_layers: int) -> tuple[int, ...]:
    return (_window(fields),) * num_layers


def _qwen3_windows(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """A window where ``layer_types`` says so; without that, from ``max_window_layers`` on."""
    window = _window(fields) if fields.flag("use_sliding_window", default=False) else 0
    if not fields.has("layer_types"):
        first = fields.integer("max_window_layers", 0, _MAX_LAYERS, 28)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    types = fields.get("layer_types")
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.invalid("layer_types", f"a list of {num_layers} types")
    windows = {"full_attention": 0} | ({"sliding_attention": window} if window else {})
    if not all(type(name) is str and name in windows for name in types):
        raise fields.unsupported("layer_types", ", ".join(windows))
    return tuple(windows[name] for name in types)


def _window(fields: Fields) -> int:
    """Tokens that a query sees, its own included; 0: all."""
    # Here null is a value: it turns off the window that an absent key leaves on.
    if not fields.is_listed("sliding_window"):
        return _DEFAULT_WINDOW
    if not fields.has("sliding_window"):
        return 0
    return fields.integer("sliding_window", 1, _MAX_CONTEXT)


@dataclass(frozen=True, slots=True)
class _HfFamily:
    """What a ``model_type`` means, and what transformers assumes for keys that are left out.

    Attributes:
        attention_bias, mlp_bias: whether such a key may say true.
        num_kv_heads: None: as many as heads.
        head_dim: None: the hidden size's share of a head.
        windows: (fields, number of layers) -> window of each layer.
        keys: that only this family has.
    """

    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    windows: Callable[[Fields, int], tuple[int, ...]] = _no_windows
    max_position: int = 2048
    keys: frozenset[str] = frozenset()


_HF_FAMILIES = MappingProxyType(
    {
        "llama": _HfFamily(attention_bias=True, mlp_bias=True),
        "mistral": _HfFamily(num_kv_heads=8, windows=_mistral_windows, max_position=131_072),
        "qwen3": _HfFamily(
            attention_bias=True,
            qk_norm=True,
            num_kv_heads=32,
            head_dim=128,
            windows=_qwen3_windows,
            max_position=32_768,
            keys=frozenset({"layer_types", "max_window_layers", "use_sliding_window"}),
        ),
    }
)


@dataclass(frozen=True, slots=True)
class _GgufFamily:
    """What an architecture means.

    Attributes:
        interleaved_qk: Q and K rows that rotate together are neighbours, not half a head apart.
        has_window: it reads ``attention.sliding_window``.
    """

    interleaved_qk: bool = False
    qk_norm: bool = False
    has_window: bool = False


_GGUF_FAMILIES = MappingProxyType(
    {
        "llama": _GgufFamily(interleaved_qk=True, has_window=True),
        "qwen3": _GgufFamily(qk_norm=True),
    }
)

_ROPE_TYPES = ("default", "linear", "llama3")
_ROPE_KEYS = MappingProxyType(
    {
        "default": frozenset(),
        "linear": frozenset({"factor"}),
        "llama3": frozenset(
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        ),
    }
)
_ROPE_COMMON_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})


def config_from_hf(config: Mapping[str, Any], source: str) -> ModelConfig:
    """Hyper-parameters of a Hugging Face ``config.json``.

    Args:
        config: the parsed object.
        source: its path, for messages.

    Raises:
        WeightFileError: a value is missing or cannot be.
        UnsupportedModelError: an architecture, key or value that is not implemented.
    """
    fields = Fields(config, source)
    model_type = fields.choice("model_type", tuple(_HF_FAMILIES))
    family = _HF_FAMILIES[model_type]
    fields.require_known(HF_HONOURED | HF_HARMLESS | HF_NEUTRAL.keys() | family.keys)
    fields.require_neutral(HF_NEUTRAL)
    for key in ("attention_bias", "mlp_bias"):
        if not getattr(family, key):
            fields.require_neutral({key: False})
    hidden_size = fields.integer("hidden_size", 1, _MAX_SIZE)
    num_heads = fields.integer("num_attention_heads", 1, _MAX_HEADS)
    default_kv_heads = family.num_kv_heads or num_heads
    if fields.is_listed("num_key_value_heads"):  # null has a meaning of its own: one for each head
        default_kv_heads = num_heads
    num_kv_heads = fields.integer("num_key_value_heads", 1, _MAX_HEADS, default_kv_heads)
    _check_groups(fields, "num_key_value_heads", num_heads, num_kv_heads)
    head_dim = _head_dim(fields, "head_dim", hidden_size, num_heads, family.head_dim)
    attention_bias = fields.flag("attention_bias", default=False)
    num_layers = fields.integer("num_hidden_layers", 1, _MAX_LAYERS)
    return ModelConfig(
        architecture=model_type,
        vocab_size=fields.integer("vocab_size", 1, _MAX_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, _MAX_SIZE),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=fields.integer(
            "max_position_embeddings", 1, _MAX_CONTEXT, family.max_position
        ),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        query_scale=head_dim**-0.5,
        attn_softcap=0.0,
        embed_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
        final_softcap=0.0,
        activation=fields.choice("hidden_act", _ACTIVATIONS, "silu"),
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
        pre_norm=True,
        post_norm=False,
        norm_zero_centered=False,
        qk_norm="head" if family.qk_norm else "none",
        interleaved_qk=False,
        ropes=(_rope_config(fields, _hf_inv_freq(fields, head_dim)),),
        layers=tuple(LayerConfig(window=w) for w in family.windows(fields, num_layers)),
    )


def config_from_gguf(
    metadata: Mapping[str, Any],
    *,
    tensor_shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: Sequence[float] | None,
    source: str,
) -> ModelConfig:
    """Hyper-parameters of a GGUF file.

    Args:
        metadata: the file's metadata.
        tensor_shapes: tensor name -> shape, outermost first. The file's tensors, not its metadata,
            say whether there are biases and an output projection, and how large the vocabulary is.
        rope_freqs: values of ``rope_freqs.weight`` where the file has it.
        source: the file's path, for messages.

    Raises:
        WeightFileError: a value is missing or cannot be.
        UnsupportedModelError: an architecture, key or value that is not implemented.
    """
    architecture = Fields(metadata, source).choice("general.architecture", tuple(_GGUF_FAMILIES))
    family = _GGUF_FAMILIES[architecture]
    fields = Fields(metadata, source, prefix=f"{architecture}.")
    fields.require_known(GGUF_HONOURED | GGUF_HARMLESS | GGUF_NEUTRAL.keys())
    fields.require_neutral(GGUF_NEUTRAL)
    hidden_size = fields.integer("embedding_length", 1, _MAX_SIZE)
    num_heads = fields.integer("attention.head_count", 1, _MAX_HEADS)
    num_kv_heads = fields.integer("attention.head_count_kv", 1, _MAX_HEADS, num_heads)
    _check_groups(fields, "attention.head_count_kv", num_heads, num_kv_heads)
    head_dim = _head_dim(fields, "attention.key_length", hidden_size, num_heads)
    fields.require_neutral({"attention.value_length": head_dim})
    if not family.has_window:
        fields.require_neutral({"attention.sliding_window": 0})
    window = fields.integer("attention.sliding_window", 0, _MAX_CONTEXT, 0)
    num_layers = fields.integer("block_count", 1, _MAX_LAYERS)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_gguf_vocab_size(fields, metadata, tensor_shapes),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length", 1, _MAX_SIZE),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=fields.integer("context_length", 1, _MAX_CONTEXT),
        rms_norm_eps=fields.positive("attention.layer_norm_rms_epsilon"),
        query_scale=head_dim**-0.5,
        attn_softcap=0.0,
        embed_scale=1.0,
        residual_scale=1.0,
        logit_scale=1.0,
        final_softcap=0.0,
        activation="silu",
        tie_embeddings="output.weight" not in tensor_shapes,
        qkv_bias="blk.0.attn_q.bias" in tensor_shapes,
        out_bias="blk.0.attn_output.bias" in tensor_shapes,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_shapes,
        pre_norm=True,
        post_norm=False,
        norm_zero_centered=False,
        qk_norm="head" if family.qk_norm else "none",
        interleaved_qk=family.interleaved_qk,
        ropes=(_rope_config(fields, _gguf_inv_freq(fields, family, head_dim, rope_freqs)),),
        layers=(LayerConfig(window=window),) * num_layers,
    )


def _check_groups(fields: Fields, key: str, num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise WeightFileError(
            fields.source, f"{num_heads} heads cannot share {num_kv_heads} key-value heads ({key})"
        )


def _head_dim(
    fields: Fields, key: str, hidden_size: int, num_heads: int, default: int | None = None
) -> int:
    if not fields.has(key) and default is None and hidden_size % num_heads:
        raise WeightFileError(
            fields.source, f"a width of {hidden_size} cannot be split into {num_heads} heads"
        )
    head_dim = fields.integer(key, 1, _MAX_HEAD_DIM, default or hidden_size // num_heads)
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        raise WeightFileError(
            fields.source, f"heads must be even and at most {_MAX_HEAD_DIM} wide, got {head_dim}"
        )
    return head_dim


# Absurd values may overflow on the way; `_rope_config` refuses what comes out of them.
_unchecked = np.errstate(over="ignore", divide="ignore", invalid="ignore")


@_unchecked
def _hf_inv_freq(fields: Fields, head_dim: int) -> FloatArray:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""
    key = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    if key == "rope_parameters" and fields.has("rope_scaling"):
        raise fields.unsupported("rope_scaling", "null beside rope_parameters")
    rope = fields.section(key)
    rope_type = _hf_rope_type(rope)
    _check_rope_keys(rope, rope_type)
    default_theta = fields.positive("rope_theta", _DEFAULT_ROPE_THETA)
    theta = rope.positive("rope_theta", default_theta)
    if fields.has("rope_theta") and theta != default_theta:
        raise rope.unsupported("rope_theta", f"{default_theta!r}, as in the top-level rope_theta")
    inv_freq = plain_inv_freq(theta, head_dim)
    if rope_type == "linear":
        return linear_inv_freq(inv_freq, rope.positive("factor"))
    if rope_type == "llama3":
        return _hf_llama3(rope, inv_freq)
    return inv_freq


def _hf_rope_type(rope: Fields) -> str:
    """``rope_type``, or ``type`` as it was called before transformers 4.43."""
    rope_type = rope.choice("type", _ROPE_TYPES, "default")
    if not rope.has("rope_type"):
        return rope_type
    if rope.has("type"):
        rope.require_neutral({"rope_type": rope_type})
    return rope.choice("rope_type", _ROPE_TYPES)


def _check_rope_keys(rope: Fields, rope_type: str) -> None:
    rope.require_known(_ROPE_COMMON_KEYS | _ROPE_KEYS[rope_type])
    rope.require_neutral({"partial_rotary_factor": 1.0})


def _hf_llama3(rope: Fields, inv_freq: FloatArray) -> FloatArray:
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if low >= high:
        raise rope.invalid("high_freq_factor", f"above low_freq_factor ({low:g})")
    return llama3_inv_freq(
        inv_freq,
        factor=rope.positive("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=rope.integer("original_max_position_embeddings", 1, _MAX_CONTEXT),
    )


@_unchecked
def _gguf_inv_freq(
    fields: Fields, family: _GgufFamily, head_dim: int, rope_freqs: Sequence[float] | None
) -> FloatArray:
    if not family.interleaved_qk:
        fields.require_neutral({"rope.dimension_count": head_dim})
    rotated_dim = fields.integer("rope.dimension_count", 1, head_dim, head_dim)
    if rotated_dim % 2:
        raise fields.invalid("rope.dimension_count", "even")
    inv_freq = plain_inv_freq(fields.positive("rope.freq_base", _DEFAULT_ROPE_THETA), rotated_dim)
    if fields.choice("rope.scaling.type", ("none", "linear"), "none") == "linear":
        inv_freq = linear_inv_freq(inv_freq, fields.positive("rope.scaling.factor"))
    if rope_freqs is not None:
        inv_freq = with_factors(inv_freq, _checked_factors(fields, rope_freqs, len(inv_freq)))
    # Q and K rows are brought from neighbouring pairs to half-head pairs over the whole head, so
    # what a partial rotation leaves alone are the last pairs: they turn with frequency zero.
    return np.pad(inv_freq, (0, (head_dim - rotated_dim) // 2))


def _checked_factors(fields: Fields, factors: Sequence[float], count: int) -> Sequence[float]:
    """Values of ``rope_freqs.weight``, ``count`` of them."""
    if len(factors) != count:
        reason = f"must have {count} values, got {len(factors)}"
    elif not all(math.isfinite(factor) and factor > 0 for factor in factors):
        reason = "its values must be finite and above 0"
    else:
        return factors
    raise WeightFileError(fields.source, reason, tensor="rope_freqs.weight")


def _rope_config(fields: Fields, inv_freq: FloatArray) -> RopeConfig:
    if not np.isfinite(inv_freq).all():
        raise WeightFileError(fields.source, "its rotary frequencies are not finite numbers")
    return RopeConfig(tuple(inv_freq.tolist()))


def _gguf_vocab_size(
    fields: Fields, metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """Rows of the embedding; other statements of the size must agree."""
    embedding = "token_embd.weight"
    if embedding not in tensor_shapes:
        raise WeightFileError(fields.source, "is missing", tensor=embedding)
    vocab_size = tensor_shapes[embedding][0]
    if not 1 <= vocab_size <= _MAX_SIZE:
        raise WeightFileError(
            fields.source, f"has {vocab_size} rows (1 to {_MAX_SIZE})", tensor=embedding
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    stated = {"the metadata": fields.integer("vocab_size", 1, _MAX_SIZE, vocab_size)}
    if isinstance(tokens, Collection):
        stated["the tokenizer"] = len(tokens)
    for who, size in stated.items():
        if size != vocab_size:
            raise WeightFileError(
                fields.source, f"has {vocab_size} rows, {who} {size} tokens", tensor=embedding
            )
    return vocab_size
