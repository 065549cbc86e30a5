"""Tiny random checkpoints of every family, as Hugging Face folders and GGUF files.

Names, shapes and permutations are those of transformers and of llama.cpp's converter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.gguf_writer import write_gguf
from reference.llama import inv_freq
from reference.tiny_llama import interleave, make_config

__all__ = [
    "FAMILIES",
    "family_config",
    "family_weights",
    "gguf_metadata",
    "write_family_gguf",
]

Floats = npt.NDArray[np.float32]
Weights = dict[str, Floats]

_GEMMA = {
    "head_dim": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    "sliding_window": 7,
}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        **_GEMMA,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "num_hidden_layers": 3,
    },
    # One layer of the seven sees everything.
    "gemma3_text": {**_GEMMA, "num_hidden_layers": 7},
    "phi3": {"original_max_position_embeddings": 256},
    "smollm3": {"num_hidden_layers": 5},
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.4,
        "residual_multiplier": 0.7,
    },
}
FAMILIES = tuple(_OWN)

_NO_BIAS_KEYS = {"phi3": ("attention_bias", "mlp_bias"), "qwen2": ("attention_bias",)}


def family_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A small ``config.json`` of the family."""
    config = make_config(model_type=model_type, vocab_size=96, pad_token_id=0, **_OWN[model_type])
    for key in _NO_BIAS_KEYS.get(model_type, ()):
        del config[key]
    if model_type.startswith("gemma"):
        config["hidden_activation"] = config["hidden_act"]
    config.update(changes)
    return config


def family_weights(config: Mapping[str, Any], seed: int) -> Weights:
    """Random weights under their Hugging Face names, exact functions of the seed on every
    platform (see `tiny_llama.make_weights`)."""
    random = np.random.RandomState(seed)
    shapes = _tensor_shapes(config)
    return {name: _draw(random, name, shape, config) for name, shape in shapes.items()}


def _draw(
    random: np.random.RandomState, name: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> Floats:
    uniform = random.random_sample(shape) * 2 - 1
    if name.endswith("norm.weight"):
        is_zero_centered = config["model_type"].startswith("gemma")
        return (uniform * 0.3 + (0 if is_zero_centered else 1)).astype(np.float32)
    if "embed_tokens" in name or len(shape) == 1:
        return (uniform * 0.5).astype(np.float32)
    # A uniform draw on [-1, 1] has variance 1 / 3.
    return np.asarray(uniform * (3 / shape[1]) ** 0.5, dtype=np.float32)


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(config["num_hidden_layers"]):
        layer = {**_norm_shapes(config), **_linear_shapes(config)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def _norm_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    family, width, head_dim = config["model_type"], config["hidden_size"], _head_dim(config)
    names = ["post_attention_layernorm"]
    if family != "olmo2":
        names.append("input_layernorm")
    if family.startswith("gemma"):
        names.append("pre_feedforward_layernorm")
    if family.startswith("gemma") or family == "olmo2":
        names.append("post_feedforward_layernorm")
    shapes = {f"{name}.weight": (width,) for name in names}
    heads = {"qwen3": (1, 1), "gemma3_text": (1, 1)}.get(family)
    if family == "olmo2":
        heads = (config["num_attention_heads"], config["num_key_value_heads"])
    for name, count in zip("qk", heads or (), strict=False):
        shapes[f"self_attn.{name}_norm.weight"] = (count * head_dim,)
    return shapes


def _linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    q_rows = config["num_attention_heads"] * _head_dim(config)
    kv_rows = config["num_key_value_heads"] * _head_dim(config)
    linears = {f"self_attn.{name}_proj": (kv_rows, width) for name in "kv"}
    linears |= {"self_attn.q_proj": (q_rows, width), "self_attn.o_proj": (width, q_rows)}
    linears |= {f"mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
    linears["mlp.down_proj"] = (width, inner)
    if config["model_type"] == "phi3":
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            del linears[f"{part}_proj"]
        linears["self_attn.qkv_proj"] = (q_rows + 2 * kv_rows, width)
        linears["mlp.gate_up_proj"] = (2 * inner, width)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if _has_bias(config, name):
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def _has_bias(config: Mapping[str, Any], name: str) -> bool:
    if config["model_type"] == "qwen2":
        return name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return bool(config.get("mlp_bias" if name.startswith("mlp") else "attention_bias"))


# ------------------------------------------------------------------------------------------- GGUF

_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
_INTERLEAVED = ("llama", "smollm3", "granite")
_GGUF_MODEL = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_family_gguf(
    path: Path, config: Mapping[str, Any], weights: Mapping[str, Floats], dtype: str = "f32"
) -> Path:
    """Write the same checkpoint as llama.cpp's converter would; matrices as ``dtype``."""
    tensors = {}
    for name, array in weights.items():
        if name.endswith("norm.weight") and config["model_type"].startswith("gemma"):
            array = array + np.float32(1)
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if f".{part}_proj." in name and _architecture(config) in _INTERLEAVED:
                array = interleave(array, config[heads])
        tensors[_gguf_name(name, config)] = (dtype if array.ndim > 1 else "f32", array)
    for name, factors in _rope_factors(config).items():
        tensors[name] = ("f32", np.asarray(factors, dtype=np.float32))
    return write_gguf(path, gguf_metadata(config), tensors)


def _architecture(config: Mapping[str, Any]) -> str:
    return _ARCHITECTURES.get(config["model_type"], config["model_type"])


def _gguf_name(name: str, config: Mapping[str, Any]) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_GGUF_MODEL[module]}.{kind}"
    index, _, own = module.removeprefix("model.layers.").partition(".")
    if own == "post_attention_layernorm":
        is_post_norm = config["model_type"] in ("gemma2", "gemma3_text", "olmo2")
        return f"blk.{index}.{'post_attention_norm' if is_post_norm else 'ffn_norm'}.{kind}"
    return f"blk.{index}.{_GGUF_LAYER[own]}.{kind}"


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    return rope


def _rotated_dim(config: Mapping[str, Any]) -> int:
    return int(_head_dim(config) * config.get("partial_rotary_factor", 1.0))


def _original_length(config: Mapping[str, Any]) -> int:
    own = _rope(config).get("original_max_position_embeddings", config["max_position_embeddings"])
    return int(config.get("original_max_position_embeddings", own))


def _rope_factors(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{n}.weight": rope[f"{n}_factor"] for n in ("long", "short")}
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": inv_freq({**config, "rope_scaling": None}) / inv_freq(config)}
    return {}


def _rope_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    rope, length = _rope(config), config["max_position_embeddings"]
    keys: dict[str, Any] = {
        "rope.dimension_count": _rotated_dim(config),
        "rope.freq_base": float(config["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = _original_length(config)
    if rope["rope_type"] == "longrope":
        keys["rope.scaling.type"] = "longrope"
        ratio = length / _original_length(config)
        keys["rope.scaling.attn_factor"] = math.sqrt(
            1 + math.log(ratio) / math.log(_original_length(config))
        )
    for key in ("attention_factor", "beta_fast", "beta_slow"):
        if key in rope:
            own = "attn_factor" if key == "attention_factor" else key
            keys[f"rope.scaling.yarn_{own}"] = float(rope[key])
    return keys


def gguf_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = _architecture(config)
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "vocab_size": config["vocab_size"],
        **_rope_metadata(config),
    }
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("logits_scaling", "logit_scale"),
        ("residual_multiplier", "residual_scale"),
        ("sliding_window", "attention.sliding_window"),
    ):
        if config.get(key):
            keys[name] = config[key]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        **{f"{architecture}.{key}": value for key, value in keys.items()},
    }
