"""The decoder as data, mirrored in ``csrc/model/config.h``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerConfig", "ModelConfig", "RopeConfig"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding.

    Attributes:
        inv_freq: inverse frequencies after all scaling, f32 values, ``rotated_dim / 2`` of them.
            Dimensions beyond ``2 * len(inv_freq)`` are not rotated.
        attention_factor: multiplies cos and sin.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer.

    Attributes:
        rope: index into `ModelConfig.ropes`; -1: no rotation.
        window: sliding window in tokens, the query's own included; 0: everything is seen.
    """

    rope: int = 0
    window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and switches of a decoder-only transformer.

    Attributes:
        architecture: the checkpoint's own name for its family, for messages.
        max_position: context length in tokens.
        query_scale: factor on ``q . k`` before the softmax.
        attn_softcap: scores become ``cap * tanh(score / cap)``; 0: they stay.
        embed_scale: factor on embedded tokens.
        residual_scale: factor on what attention and the MLP add to the residual stream.
        logit_scale: factor on logits.
        final_softcap: logits, scaled, become ``cap * tanh(logit / cap)``; 0: they stay.
        activation: ``silu`` or ``gelu_tanh``.
        tie_embeddings: the output projection is the embedding.
        qkv_bias, out_bias, mlp_bias: which projections have biases.
        pre_norm: RMSNorm of what attention and the MLP read.
        post_norm: RMSNorm of what attention and the MLP add to the residual stream.
        norm_zero_centered: norm weights are stored less 1; undone when they are read.
        qk_norm: RMSNorm of queries and keys before their rotation: ``none``, ``head`` (each head,
            by the same weights) or ``row`` (all heads of a token together).
        interleaved_qk: Q and K rows are stored in the interleaved-RoPE order (llama files of
            GGUF); undone at repack.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    query_scale: float
    attn_softcap: float = 0.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    final_softcap: float = 0.0
    activation: str = "silu"
    tie_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    pre_norm: bool = True
    post_norm: bool = False
    norm_zero_centered: bool = False
    qk_norm: str = "none"
    interleaved_qk: bool = False
    ropes: tuple[RopeConfig, ...]
    layers: tuple[LayerConfig, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)
