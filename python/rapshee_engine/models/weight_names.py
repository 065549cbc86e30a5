"""Tensor names: canonical <- Hugging Face and GGUF, and the shapes that a configuration implies.

Canonical names, with D hidden size, I intermediate size, V vocabulary, Hq and Hkv heads of width d:

    embed.weight [V, D]    final_norm.weight [D]    head.weight [V, D] (absent if tied)
    layers.{i}.q.weight [Hq*d, D]    layers.{i}.{k,v}.weight [Hkv*d, D]
    layers.{i}.{attn_norm,mlp_norm}.weight [D] (with ``pre_norm``)
    layers.{i}.{attn_post_norm,mlp_post_norm}.weight [D] (with ``post_norm``)
    layers.{i}.{q_norm,k_norm}.weight [d], or [Hq*d] and [Hkv*d] (as ``qk_norm`` says)
    layers.{i}.o.weight [D, Hq*d]
    layers.{i}.{gate,up}.weight [I, D]    layers.{i}.down.weight [D, I]

and ``.bias`` beside those ``.weight`` whose projections have one. Some files hold several of these
in one tensor, one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import ModelConfig

__all__ = [
    "NameTable",
    "TensorRows",
    "canonical_shapes",
    "gguf_names",
    "hf_names",
    "match_tensors",
]


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Where a canonical tensor lies: rows (of a vector: elements) of one tensor of the file.

    Attributes:
        name: of the file's tensor.
        first_row: of the canonical tensor in it.
        shape: of the canonical tensor.
    """

    name: str
    first_row: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NameTable:
    """How one file format names tensors.

    Attributes:
        model: canonical module -> name, outside the layers.
        layer: canonical module -> name, below ``layer_prefix``.
        layer_prefix: of layer ``i``, with ``{i}`` in it.
        fused: name, below ``layer_prefix``, -> canonical modules that lie one below the other in
            it, where the file has such a tensor; always, for modules without a name of their own.
        ignored: names of tensors that are knowingly left unread.
    """

    model: Mapping[str, str]
    layer: Mapping[str, str]
    layer_prefix: str
    fused: Mapping[str, tuple[str, ...]]
    ignored: re.Pattern[str]

    def file_name(self, canonical: str) -> str:
        """The file's name of a canonical tensor that lies in a tensor of its own."""
        module, _, kind = canonical.rpartition(".")
        if not module.startswith("layers."):
            return f"{self.model[module]}.{kind}"
        _, index, layer_module = module.split(".")
        return f"{self.layer_prefix.format(i=index)}{self.layer[layer_module]}.{kind}"

    def locate(
        self, canonical: str, needed: Mapping[str, tuple[int, ...]], present: Collection[str]
    ) -> tuple[TensorRows, tuple[int, ...]]:
        """Where a canonical tensor lies, and the shape that the file's tensor must have.

        Args:
            needed: canonical name -> shape of all that the model needs.
            present: names of the file's tensors.
        """
        shape = needed[canonical]
        module, _, kind = canonical.rpartition(".")
        layer, _, own = module.rpartition(".")
        for name, modules in self.fused.items() if layer else ():
            file_name = f"{self.layer_prefix.format(i=layer.split('.')[1])}{name}.{kind}"
            if own in modules and (file_name in present or own not in self.layer):
                rows = [needed[f"{layer}.{part}.{kind}"][0] for part in modules]
                first_row = sum(rows[: modules.index(own)])
                return TensorRows(file_name, first_row, shape), (sum(rows), *shape[1:])
        return TensorRows(self.file_name(canonical), 0, shape), shape


_HF_MODEL = MappingProxyType(
    {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
)
_HF_LAYER = MappingProxyType(
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
)
# Where what attention and the MLP add is normalised, the name of the norm between them is its.
_HF_POST_NORMS = MappingProxyType(
    {
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
)
_HF_FUSED = MappingProxyType(
    {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
)
# Old checkpoints store the rotary frequencies, which the configuration gives as well.
_HF_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_GGUF_MODEL = MappingProxyType(
    {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
)
_GGUF_LAYER = MappingProxyType(
    {
        "attn_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
        "o": "attn_output",
        "attn_post_norm": "post_attention_norm",
        "mlp_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
        "mlp_post_norm": "post_ffw_norm",
    }
)
# Read when the configuration is made.
_GGUF_IGNORED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")


def hf_names(config: ModelConfig) -> NameTable:
    """Names in a Hugging Face checkpoint of that model."""
    is_fused = config.architecture == "phi3"
    layer = {**_HF_LAYER, **(_HF_POST_NORMS if config.post_norm else {})}
    fused = _HF_FUSED if is_fused else {}
    for modules in fused.values():
        for module in modules:
            del layer[module]
    return NameTable(_HF_MODEL, layer, "model.layers.{i}.", fused, _HF_IGNORED)


def gguf_names(config: ModelConfig) -> NameTable:
    """Names in a GGUF file of that model."""
    layer: dict[str, str] = dict(_GGUF_LAYER)
    fused: dict[str, tuple[str, ...]] = {"attn_qkv": ("q", "k", "v")}
    if config.architecture == "phi3":
        del layer["gate"], layer["up"]
        fused["ffn_up"] = ("gate", "up")
    return NameTable(_GGUF_MODEL, layer, "blk.{i}.", fused, _GGUF_IGNORED)


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
) -> dict[str, TensorRows]:
    """Canonical name -> where it lies, of every tensor that the model needs.

    Args:
        config: the model.
        names: the file format's names.
        shapes: the file's tensors, name -> shape.
        file: its path, for messages.

    Raises:
        WeightFileError: a tensor is missing or has another shape than the configuration implies.
        UnsupportedModelError: the file holds a tensor that the model has no use for.
    """
    needed = canonical_shapes(config)
    matched: dict[str, TensorRows] = {}
    for canonical in needed:
        rows, expected = names.locate(canonical, needed, shapes)
        if rows.name not in shapes:
            raise WeightFileError(file, "is missing", tensor=rows.name)
        if shapes[rows.name] != expected:
            got = list(shapes[rows.name])
            raise WeightFileError(
                file, f"must have shape {list(expected)}, got {got}", tensor=rows.name
            )
        matched[canonical] = rows
    # Some tied checkpoints store the projection again; the configuration decides.
    used = {*(rows.name for rows in matched.values()), names.file_name("head.weight")}
    for name in shapes:
        if name not in used and not names.ignored.fullmatch(name):
            raise UnsupportedModelError(
                f"{file}: tensor {name!r:.200} is not known to this engine and might change the"
                " model's results"
            )
    return matched
