"""Tiny random checkpoints of llama, mistral and qwen3, as Hugging Face folders and GGUF files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.gguf_writer import write_gguf
from reference.llama import head_dim_of, inv_freq, rope_settings
from reference.quant import round_trip
from reference.safetensors_writer import write_safetensors

__all__ = [
    "interleave",
    "make_config",
    "make_weights",
    "stored_weights",
    "write_gguf_file",
    "write_hf_folder",
    "write_sharded_folder",
]

Weights = dict[str, npt.NDArray[np.float32]]

_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# Mistral files are of the architecture llama, whose Q and K rows are interleaved.
_GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3"}


def make_config(**changes: Any) -> dict[str, Any]:
    """A small ``config.json`` with grouped-query attention and tied embeddings."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    config.update(changes)
    return config


def make_weights(config: Mapping[str, Any], seed: int) -> Weights:
    """Random weights under their Hugging Face names.

    The values are exact functions of the seed on every platform: uniform draws of numpy's frozen
    `RandomState`, scaled so that attention is neither flat nor one-hot and logits spread over a
    few units.
    """
    random = np.random.RandomState(seed)

    def draw(*shape: int, scale: float) -> npt.NDArray[np.float32]:
        return ((random.random_sample(shape) * 2 - 1) * scale).astype(np.float32)

    def linear(name: str, rows: int, columns: int, bias: bool) -> Weights:
        # A uniform draw on [-1, 1] has variance 1 / 3.
        tensors = {f"{name}.weight": draw(rows, columns, scale=(3 / columns) ** 0.5)}
        if bias:
            tensors[f"{name}.bias"] = draw(rows, scale=0.5)
        return tensors

    def norm(name: str, size: int) -> Weights:
        return {f"{name}.weight": 1 + draw(size, scale=0.3)}

    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], head_dim_of(config)
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head_dim
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    weights = {"model.embed_tokens.weight": draw(config["vocab_size"], width, scale=0.5)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        weights |= norm(f"{layer}.input_layernorm", width)
        weights |= linear(f"{layer}.self_attn.q_proj", q_rows, width, attention_bias)
        weights |= linear(f"{layer}.self_attn.k_proj", kv_rows, width, attention_bias)
        weights |= linear(f"{layer}.self_attn.v_proj", kv_rows, width, attention_bias)
        if config["model_type"] == "qwen3":
            weights |= norm(f"{layer}.self_attn.q_norm", head_dim)
            weights |= norm(f"{layer}.self_attn.k_norm", head_dim)
        weights |= linear(f"{layer}.self_attn.o_proj", width, q_rows, attention_bias)
        weights |= norm(f"{layer}.post_attention_layernorm", width)
        weights |= linear(f"{layer}.mlp.gate_proj", inner, width, mlp_bias)
        weights |= linear(f"{layer}.mlp.up_proj", inner, width, mlp_bias)
        weights |= linear(f"{layer}.mlp.down_proj", width, inner, mlp_bias)
    weights |= norm("model.norm", width)
    if not config.get("tie_word_embeddings"):
        weights |= linear("lm_head", config["vocab_size"], width, bias=False)
    return weights


def stored_weights(weights: Mapping[str, npt.NDArray[np.float32]], dtype: str) -> Weights:
    """The values that a checkpoint written with ``dtype`` holds; vectors stay f32 in a GGUF."""
    return {name: round_trip(w, dtype) if w.ndim > 1 else w for name, w in weights.items()}


def write_hf_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, npt.NDArray[np.float32]],
    dtype: str = "f32",
) -> Path:
    """Write ``config.json`` and ``model.safetensors``; matrices as ``dtype``, vectors as f32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: (dtype if w.ndim > 1 else "f32", w) for name, w in weights.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_sharded_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, npt.NDArray[np.float32]],
    shards: int,
) -> Path:
    """As `write_hf_folder`, in f32, the tensors dealt out in order to files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        own = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_safetensors(folder / file, {name: ("f32", weights[name]) for name in own})
        weight_map |= dict.fromkeys(own, file)
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_gguf_file(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, npt.NDArray[np.float32]],
    dtype: str = "f32",
    metadata: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """Write the same checkpoint as llama.cpp's converter would; matrices as ``dtype``.

    Args:
        dtypes: of matrices whose Hugging Face names contain the key, instead of ``dtype``.
        metadata: added to (or replacing) what follows from ``config``, e.g. a tokenizer.
    """
    tensors = {}
    is_interleaved = _GGUF_ARCHITECTURES[config["model_type"]] == "llama"
    for name, array in weights.items():
        if ".q_proj." in name and is_interleaved:
            array = interleave(array, config["num_attention_heads"])
        elif ".k_proj." in name and is_interleaved:
            array = interleave(
                array, config.get("num_key_value_heads") or config["num_attention_heads"]
            )
        own = (other for part, other in (dtypes or {}).items() if part in name)
        tensors[_gguf_name(name)] = (next(own, dtype) if array.ndim > 1 else "f32", array)
    if rope_settings(config)["rope_type"] == "llama3":
        plain = inv_freq({**config, "rope_scaling": None, "rope_parameters": None} | _theta(config))
        tensors["rope_freqs.weight"] = ("f32", plain / inv_freq(config))
    return write_gguf(path, {**_gguf_metadata(config), **(metadata or {})}, tensors)


def _theta(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_theta": rope_settings(config)["rope_theta"]}


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        index, _, layer_module = module.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{_GGUF_LAYER_NAMES[layer_module]}.{kind}"
    model = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return f"{model[module]}.{kind}"


def interleave(array: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows (i, i + d/2) of each head, which rotate together, become neighbours."""
    halves = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _gguf_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    rope, architecture = rope_settings(config), _GGUF_ARCHITECTURES[config["model_type"]]
    sizes = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads")
        or config["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": head_dim_of(config),
        "attention.value_length": head_dim_of(config),
        "rope.dimension_count": head_dim_of(config),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if rope["rope_type"] == "linear":
        sizes["rope.scaling.type"] = "linear"
        sizes["rope.scaling.factor"] = float(rope["factor"])
    if config.get("sliding_window"):
        sizes["attention.sliding_window"] = config["sliding_window"]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
    }
