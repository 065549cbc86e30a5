from __future__ import annotations

import math
from typing import Any

import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.models.hf_config import config_from_hf
from reference.tiny_families import family_config


def model(model_type: str, **changes: Any) -> ModelConfig:
    return config_from_hf(family_config(model_type, **changes), "config.json")


def bare(model_type: str) -> ModelConfig:
    """With the sizes that have no default, and nothing else."""
    sizes = {
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
    }
    return config_from_hf(sizes, "config.json")


# What differs from a plain llama, beside numbers.
MECHANISMS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "gemma2": {
        "post_norm": True,
        "norm_zero_centered": True,
        "activation": "gelu_tanh",
    },
    "gemma3_text": {
        "post_norm": True,
        "norm_zero_centered": True,
        "activation": "gelu_tanh",
        "qk_norm": "head",
    },
    "phi3": {},
    "smollm3": {},
    "olmo2": {"pre_norm": False, "post_norm": True, "qk_norm": "row"},
    "granite": {},
}
SWITCHES = {
    "activation", "interleaved_qk", "mlp_bias", "norm_zero_centered", "out_bias", "post_norm",
    "pre_norm", "qk_norm", "qkv_bias",
}  # fmt: skip


@pytest.mark.parametrize("model_type", MECHANISMS)
def test_mechanisms(model_type: str) -> None:
    plain, config = model("llama"), model(model_type)
    differing = {
        name: getattr(config, name)
        for name in SWITCHES
        if getattr(config, name) != getattr(plain, name)
    }
    assert differing == MECHANISMS[model_type]


# Those of transformers: context, epsilon, key-value heads of 32, head size, tied embeddings.
@pytest.mark.parametrize(
    ("model_type", "defaults"),
    [
        ("qwen2", (32_768, 1e-6, 32, 2, False)),
        ("gemma2", (8192, 1e-6, 4, 256, True)),
        ("gemma3_text", (131_072, 1e-6, 4, 256, True)),
        ("phi3", (4096, 1e-5, 32, 2, False)),
        ("smollm3", (32_768, 1e-6, 4, 2, True)),
        ("olmo2", (2048, 1e-5, 32, 2, False)),
        ("granite", (2048, 1e-6, 32, 2, False)),
    ],
)
def test_defaults_are_those_of_transformers(model_type: str, defaults: tuple[Any, ...]) -> None:
    config = bare(model_type)
    assert defaults == (
        config.max_position,
        config.rms_norm_eps,
        config.num_kv_heads,
        config.head_dim,
        config.tie_embeddings,
    )


def test_gemma_scales() -> None:
    config = model("gemma2", query_pre_attn_scalar=144)
    assert (config.embed_scale, config.query_scale) == (8.0, 1 / 12)
    assert (config.attn_softcap, config.final_softcap) == (3.0, 4.0)
    plain = bare("gemma2")
    assert (plain.query_scale, plain.attn_softcap, plain.final_softcap) == (1 / 16, 50.0, 30.0)
    without = model("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (without.attn_softcap, without.final_softcap) == (0.0, 0.0)
    assert (bare("gemma3_text").attn_softcap, bare("gemma3_text").final_softcap) == (0.0, 0.0)
    assert model("gemma3_text", final_logit_softcapping=9).final_softcap == 9.0


def test_a_cap_that_transformers_does_not_apply_is_not_applied() -> None:
    assert model("gemma3_text", attn_logit_softcapping=50.0) == model("gemma3_text")


def test_granite_scales() -> None:
    config = model("granite", logits_scaling=8.0)
    scales = (config.embed_scale, config.query_scale, config.residual_scale, config.logit_scale)
    assert scales == (3.0, 0.2, 0.7, 0.125)
    plain = bare("granite")
    scales = (plain.embed_scale, plain.query_scale, plain.residual_scale, plain.logit_scale)
    assert scales == (1.0, 1.0, 1.0, 1.0)


# Keys as published checkpoints have them, beside those of every family.
@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("qwen2", {"use_mrope": False, "max_window_layers": 21, "sliding_window": 32768}),
        ("gemma2", {"cache_implementation": "hybrid", "sliding_window_size": 4096}),
        (
            "gemma3_text",
            {
                "attn_logit_softcapping": None,
                "cache_implementation": "hybrid",
                "rope_local_base_freq": 10000.0,
                "rope_scaling": None,
                "sliding_window_pattern": 6,
                "use_bidirectional_attention": False,
            },
        ),
        (
            "phi3",
            {
                "attention_bias": False,
                "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
                "embd_pdrop": 0.0,
                "full_attn_mod": 1,
                "interpolate_factor": 1,
                "lm_head_bias": False,
                "mlp_bias": False,
                "partial_rotary_factor": 1.0,
                "resid_pdrop": 0.0,
                "sliding_window": 262144,
            },
        ),
        (
            "smollm3",
            {
                "layer_types": ["full_attention"] * 5,
                "max_window_layers": 28,
                "no_rope_layer_interval": 4,
                "no_rope_layers": [1, 1, 1, 0, 1],
                "pretraining_tp": 2,
                "sliding_window": None,
                "use_sliding_window": False,
            },
        ),
        ("olmo2", {"attention_bias": False}),
        ("granite", {"mlp_bias": False}),
    ],
)
def test_published_keys_are_known(model_type: str, keys: dict[str, Any]) -> None:
    assert model(model_type, **keys).architecture == model_type


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("qwen2", {"attention_bias": True}, "attention_bias = True"),
        ("qwen2", {"dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
        ("gemma", {}, "model_type = 'gemma'"),
        ("gemma3", {}, "model_type = 'gemma3'"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
        ("gemma2", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern"),
        ("phi3", {"attention_bias": True}, "attention_bias = True"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias = True"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"attention_multiplier": 0.5}, "attention_multiplier"),
        ("granite", {"num_local_experts": 8}, "num_local_experts"),
    ],
)
def test_refuses_by_name(model_type: str, changes: dict[str, Any], named: str) -> None:
    base = family_config("llama" if model_type in ("gemma", "gemma3") else model_type)
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_hf({**base, "model_type": model_type, **changes}, "config.json")


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a number"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be a number"),
        ("gemma2", {"final_logit_softcapping": math.nan}, "final_logit_softcapping must be"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be a number"),
        ("granite", {"residual_multiplier": "1"}, "residual_multiplier must be a number"),
        ("granite", {"embedding_multiplier": -2.0}, "embedding_multiplier must be a number"),
    ],
)
def test_refuses_impossible_values(model_type: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason):
        model(model_type, **changes)
