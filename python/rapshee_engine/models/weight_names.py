"""Tensor names: canonical <- Hugging Face and GGUF, and the shapes that a configuration implies.

Canonical names, with D hidden size, I intermediate size, V vocabulary, Hq and Hkv heads of width d:

    embed.weight [V, D]    final_norm.weight [D]    head.weight [V, D] (absent if tied)
    layers.{i}.q.weight [Hq*d, D]    layers.{i}.{k,v}.weight [Hkv*d, D]
    layers.{i}.{attn_norm,mlp_norm}.weight [D] (with ``pre_norm``)
    layers.{i}.{attn_post_norm,mlp_post_norm}.weight [D] (with ``post_norm``)
    layers.{i}.{q_norm,k_norm}.weight [d], or [Hq*d] and [Hkv*d] (as ``qk_norm`` says)
    layers.{i}.o.weight [D, Hq*d]
    layers.{i}.{gate,up}.weight [I, D]    layers.{i}.down.weight [D, I]

and ``.bias`` beside those ``.weight`` whose projections have one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import ModelConfig

__all__ = ["GGUF_NAMES", "HF_NAMES", "NameTable", "canonical_shapes", "match_tensors"]


@dataclass(frozen=True, slots=True)
class NameTable:
    """How one file format names tensors.

    Attributes:
        model: canonical module -> name, outside the layers.
        layer: canonical module -> name, below ``layer_prefix``.
        layer_prefix: of layer ``i``, with ``{i}`` in it.
        ignored: names of tensors that are knowingly left unread.
    """

    model: Mapping[str, str]
    layer: Mapping[str, str]
    layer_prefix: str
    ignored: re.Pattern[str]

    def file_name(self, canonical: str) -> str:
        """The file's name of a canonical tensor."""
        module, _, kind = canonical.rpartition(".")
        if not module.startswith("layers."):
            return f"{self.model[module]}.{kind}"
        _, index, layer_module = module.split(".")
        return f"{self.layer_prefix.format(i=index)}{self.layer[layer_module]}.{kind}"


HF_NAMES = NameTable(
    model=MappingProxyType(
        {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    ),
    layer=MappingProxyType(
        {
            "attn_norm": "input_layernorm",
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "q_norm": "self_attn.q_norm",
            "k_norm": "self_attn.k_norm",
            "o": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }
    ),
    layer_prefix="model.layers.{i}.",
    # Old checkpoints store the rotary frequencies, which the configuration gives as well.
    ignored=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)

GGUF_NAMES = NameTable(
    model=MappingProxyType({"embed": "token_embd", "final_norm": "output_norm", "head": "output"}),
    layer=MappingProxyType(
        {
            "attn_norm": "attn_norm",
            "q": "attn_q",
            "k": "attn_k",
            "v": "attn_v",
            "q_norm": "attn_q_norm",
            "k_norm": "attn_k_norm",
            "o": "attn_output",
            "mlp_norm": "ffn_norm",
            "gate": "ffn_gate",
            "up": "ffn_up",
            "down": "ffn_down",
        }
    ),
    layer_prefix="blk.{i}.",
    # Read when the configuration is made.
    ignored=re.compile(r"rope_freqs\.weight"),
)


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that the model needs, in the order of use."""
    width, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocab, width)}
    layer_shapes = _layer_shapes(config)
    for i in range(config.num_layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer_shapes.items()})
    shapes["final_norm.weight"] = (width,)
    if not config.tie_embeddings:
        shapes["head.weight"] = (vocab, width)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if config.pre_norm:
        shapes["attn_norm.weight"] = (width,)
    for name, rows, columns, has_bias in (
        ("q", q_rows, width, config.qkv_bias),
        ("k", kv_rows, width, config.qkv_bias),
        ("v", kv_rows, width, config.qkv_bias),
        ("o", width, q_rows, config.out_bias),
        ("gate", inner, width, config.mlp_bias),
        ("up", inner, width, config.mlp_bias),
        ("down", width, inner, config.mlp_bias),
    ):
        if name == "o" and config.qk_norm == "head":
            shapes["q_norm.weight"] = shapes["k_norm.weight"] = (config.head_dim,)
        elif name == "o" and config.qk_norm == "row":
            shapes |= {"q_norm.weight": (q_rows,), "k_norm.weight": (kv_rows,)}
        if name == "gate" and config.post_norm:
            shapes["attn_post_norm.weight"] = (width,)
        if name == "gate" and config.pre_norm:
            shapes["mlp_norm.weight"] = (width,)
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    if config.post_norm:
        shapes["mlp_post_norm.weight"] = (width,)
    return shapes


def match_tensors(
    config: ModelConfig, names: NameTable, shapes: Mapping[str, tuple[int, ...]], file: str
) -> dict[str, str]:
    """Canonical name -> the file's name of every tensor that the model needs.

    Args:
        config: the model.
        names: the file format's names.
        shapes: the file's tensors, name -> shape.
        file: its path, for messages.

    Raises:
        WeightFileError: a tensor is missing or has another shape than the configuration implies.
        UnsupportedModelError: the file holds a tensor that the model has no use for.
    """
    matched: dict[str, str] = {}
    for canonical, expected in canonical_shapes(config).items():
        name = names.file_name(canonical)
        if name not in shapes:
            raise WeightFileError(file, "is missing", tensor=name)
        if shapes[name] != expected:
            raise WeightFileError(
                file, f"must have shape {list(expected)}, got {list(shapes[name])}", tensor=name
            )
        matched[canonical] = name
    # Some tied checkpoints store the projection again; the configuration decides.
    used = {*matched.values(), names.file_name("head.weight")}
    for name in shapes:
        if name not in used and not names.ignored.fullmatch(name):
            raise UnsupportedModelError(
                f"{file}: tensor {name!r} is not known to this engine and might change the"
                " model's results"
            )
    return matched
