"""The forward pass of llama, mistral and qwen3 over a whole sequence, in plain numpy.

Takes a Hugging Face ``config.json`` object and weights under their Hugging Face names. There is no
cache, no batch and no blocking: each line is the formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["forward", "head_dim_of", "inv_freq", "rope_settings", "windows_of"]

Array = npt.NDArray[np.floating[Any]]


def forward(
    weights: Mapping[str, npt.NDArray[np.float32]],
    config: Mapping[str, Any],
    token_ids: Sequence[int],
    dtype: type[np.floating[Any]] = np.float64,
) -> Array:
    """Logits [T, V] at every position of ``token_ids``, computed in ``dtype``."""
    w = {name: value.astype(dtype) for name, value in weights.items()}
    eps = config.get("rms_norm_eps", 1e-6)
    x = w["model.embed_tokens.weight"][np.asarray(token_ids)]
    for i in range(config["num_hidden_layers"]):
        layer = _below(w, f"model.layers.{i}.")
        normed = _rms_norm(x, layer["input_layernorm.weight"], eps)
        x = x + _attention(normed, layer, config, windows_of(config)[i])
        x = x + _mlp(_rms_norm(x, layer["post_attention_layernorm.weight"], eps), layer)
    x = _rms_norm(x, w["model.norm.weight"], eps)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return x @ head.T


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta``, ``rope_type`` and the scaling's parameters, from either spelling."""
    settings = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    settings.update(config.get("rope_scaling") or {})
    settings.update(config.get("rope_parameters") or {})
    settings["rope_type"] = settings.pop("type", settings["rope_type"])
    return settings


def inv_freq(config: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Rotary frequencies [d / 2] with their scaling."""
    rope = rope_settings(config)
    head_dim = head_dim_of(config)
    plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope["rope_type"] == "linear":
        return np.asarray(plain / rope["factor"])
    if rope["rope_type"] == "llama3":
        return np.array([_llama3(frequency, rope) for frequency in plain])
    return np.asarray(plain)


def _llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)
    return kept * frequency + (1.0 - kept) * frequency / rope["factor"]


def head_dim_of(config: Mapping[str, Any]) -> int:
    explicit = config.get("head_dim") or {"qwen3": 128}.get(config["model_type"])
    return int(explicit or config["hidden_size"] // config["num_attention_heads"])


def windows_of(config: Mapping[str, Any]) -> list[int]:
    """Tokens that a query sees in each layer, its own included; 0: all."""
    num_layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    if config["model_type"] != "qwen3":
        return [window] * num_layers
    if not config.get("use_sliding_window"):
        return [0] * num_layers
    default = ["full_attention"] * config["max_window_layers"] + ["sliding_attention"] * num_layers
    types = config.get("layer_types") or default[:num_layers]
    return [window if name == "sliding_attention" else 0 for name in types]


def _below(w: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name[len(prefix) :]: v for name, v in w.items() if name.startswith(prefix)}


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _linear(x: Array, layer: Mapping[str, Array], name: str) -> Array:
    y = x @ layer[f"{name}.weight"].T
    return y + layer[f"{name}.bias"] if f"{name}.bias" in layer else y


def _mlp(x: Array, layer: Mapping[str, Array]) -> Array:
    gate = _linear(x, layer, "mlp.gate_proj")
    up = _linear(x, layer, "mlp.up_proj")
    return _linear(gate / (1 + np.exp(-gate)) * up, layer, "mlp.down_proj")


def _rotate(x: Array, frequencies: Array) -> Array:
    """Rotate the halves of each head, [T, heads, d], by position times frequency."""
    angles = np.arange(len(x))[:, None] * frequencies
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (np.cos, np.sin))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(
    x: Array, layer: Mapping[str, Array], config: Mapping[str, Any], window: int
) -> Array:
    tokens, head_dim = len(x), head_dim_of(config)
    frequencies = inv_freq(config)
    q, k, v = (
        _linear(x, layer, f"self_attn.{name}_proj").reshape(tokens, -1, head_dim) for name in "qkv"
    )
    if "self_attn.q_norm.weight" in layer:
        eps = config.get("rms_norm_eps", 1e-6)
        q = _rms_norm(q, layer["self_attn.q_norm.weight"], eps)
        k = _rms_norm(k, layer["self_attn.k_norm.weight"], eps)
    q, k = _rotate(q, frequencies), _rotate(k, frequencies)
    heads_per_kv = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, heads_per_kv, axis=1), np.repeat(v, heads_per_kv, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(head_dim)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    visible = (distance >= 0) & (distance < (window or tokens))
    scores = np.where(visible, scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities = scores / scores.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hij,jhd->ihd", probabilities, v).reshape(tokens, -1)
    return _linear(mixed, layer, "self_attn.o_proj")
