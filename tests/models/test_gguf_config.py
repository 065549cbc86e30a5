from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import LayerConfig, ModelConfig
from rapshee_engine.models.gguf_config import config_from_gguf
from rapshee_engine.models.gguf_families import GGUF_FAMILIES
from rapshee_engine.models.gguf_rope import ROPE_FACTORS
from rapshee_engine.models.hf_config import config_from_hf
from rapshee_engine.models.known_keys import GGUF_HARMLESS, GGUF_HONOURED
from reference.tiny_families import FAMILIES, family_config, gguf_metadata
from reference.tiny_llama import make_config


def from_hf(**changes: Any) -> ModelConfig:
    return config_from_hf(make_config(**changes), "config.json")


SHAPES = {"token_embd.weight": (160, 64)}


def llama_metadata(**changes: Any) -> dict[str, Any]:
    """``llama.*`` keys with dots written as two underscores."""
    metadata = {
        "general.architecture": "llama",
        "general.name": "anything",
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata.update({f"llama.{key.replace('__', '.')}": v for key, v in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def from_gguf(
    metadata: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    rope_factors: Mapping[str, list[float]] | None = None,
    **changes: Any,
) -> ModelConfig:
    return config_from_gguf(
        metadata or llama_metadata(**changes),
        tensor_shapes=shapes or SHAPES,
        rope_factors=rope_factors or {},
        source="model.gguf",
    )


def test_llama() -> None:
    config = from_gguf()
    assert config.architecture == "llama"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (160, 64, 96)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.max_position, config.rms_norm_eps) == (256, 1e-5)
    assert config.interleaved_qk
    assert config.tie_embeddings
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (False, False, False)
    assert config.ropes == from_hf().ropes
    assert config.layers == from_hf().layers


def test_tensors_decide_biases_and_tying() -> None:
    config = from_gguf(
        shapes={
            **SHAPES,
            "output.weight": (160, 64),
            "blk.0.attn_q.bias": (64,),
            "blk.0.attn_output.bias": (64,),
            "blk.0.ffn_gate.bias": (96,),
        }
    )
    assert not config.tie_embeddings
    assert config.qkv_bias
    assert config.out_bias
    assert config.mlp_bias


def gguf_qwen3(**changes: Any) -> ModelConfig:
    metadata = llama_metadata(**changes)
    renamed = {key.replace("llama.", "qwen3."): value for key, value in metadata.items()}
    return from_gguf({**renamed, "general.architecture": "qwen3"})


def test_qwen3() -> None:
    config = gguf_qwen3(attention__key_length=32, attention__value_length=32)
    assert (config.architecture, config.head_dim) == ("qwen3", 32)
    assert config.qk_norm == "head"
    assert not config.interleaved_qk
    assert config.ropes == from_hf(head_dim=32).ropes
    assert from_gguf().qk_norm == "none"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention__sliding_window": 9}, "qwen3.attention.sliding_window = 9"),
        ({"rope__dimension_count": 8}, "qwen3.rope.dimension_count = 8"),
    ],
)
def test_qwen3_refuses_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        gguf_qwen3(**changes)


def test_optional_keys() -> None:
    assert from_gguf(attention__head_count_kv=None).num_kv_heads == 4
    wide = from_gguf(attention__key_length=32, attention__value_length=32)
    assert (wide.head_dim, wide.query_scale) == (32, 32**-0.5)
    assert from_gguf(attention__sliding_window=9).layers == (LayerConfig(window=9),) * 2
    assert from_gguf(rope__freq_base=5000.0).ropes == from_hf(rope_theta=5000.0).ropes


def test_partial_rope() -> None:
    # Heads of 16: four pairs turn as in a head of 8, four stand still.
    (rope,) = from_gguf(rope__dimension_count=8).ropes
    assert rope.inv_freq == from_hf(head_dim=8).ropes[0].inv_freq + (0.0,) * 4


def test_linear_rope() -> None:
    scaled = from_gguf(rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert scaled.ropes == from_hf(rope_scaling={"type": "linear", "factor": 4.0}).ropes
    assert from_gguf(rope__scaling__type="none").ropes == from_hf().ropes


def test_rope_factors() -> None:
    factors = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]
    plain, scaled = (
        from_gguf().ropes[0],
        from_gguf(rope_factors={"rope_freqs.weight": factors}).ropes[0],
    )
    np.testing.assert_allclose(np.divide(plain.inv_freq, scaled.inv_freq), factors, rtol=1e-6)


def test_other_namespaces_are_ignored() -> None:
    metadata = {**llama_metadata(), "general.file_type": 3, "quantize.imatrix.file": "x"}
    assert from_gguf(metadata) == from_gguf()


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.architecture": "gemma3n"}, "general.architecture = 'gemma3n'"),
        (llama_metadata(rope__scaling__type="ntk"), "llama.rope.scaling.type = 'ntk'"),
        (llama_metadata(expert_count=8), "llama.expert_count = 8"),
        (llama_metadata(attention__value_length=8), "llama.attention.value_length = 8"),
        (llama_metadata(logit_scale=0.5), "llama.logit_scale = 0.5 is not known"),
        (llama_metadata(tensor_data_layout="other"), "llama.tensor_data_layout = 'other'"),
    ],
)
def test_refuses_by_name(metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        from_gguf(metadata)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": 1 << 20}, "llama.block_count must be an integer from 1 to 4096"),
        ({"embedding_length": [64, 64]}, "llama.embedding_length must be an integer"),
        ({"attention__head_count_kv": 3}, "4 heads cannot share 3"),
        ({"attention__key_length": 15}, "must be even"),
        ({"attention__layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
        ({"attention__layer_norm_rms_epsilon": math.nan}, "rms_epsilon must be a number"),
        ({"rope__dimension_count": 18}, "dimension_count must be an integer from 1 to 16"),
        ({"rope__dimension_count": 5}, "dimension_count must be even"),
        ({"rope__freq_base": math.inf}, "freq_base must be a number"),
        ({"rope__scaling__type": "linear"}, "rope.scaling.factor is missing"),
        ({"vocab_size": 161}, "has 160 rows, the metadata 161 tokens"),
        ({"rope_factors": {"rope_freqs.weight": [1.0] * 7}}, "must have 8 values, got 7"),
        (
            {"rope_factors": {"rope_freqs.weight": [1.0] * 7 + [math.nan]}},
            "must be finite and above 0",
        ),
        ({"rope_factors": {"rope_freqs.weight": [1.0] * 7 + [0.0]}}, "must be finite and above 0"),
        ({"shapes": {"output.weight": (160, 64)}}, "'token_embd.weight': is missing"),
        ({"shapes": {"token_embd.weight": (1 << 30, 64)}}, "has 1073741824 rows"),
    ],
)
def test_refuses_impossible_values(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason) as caught:
        from_gguf(**changes)
    assert caught.value.file == "model.gguf"


def test_vocabulary_must_fit_the_embedding() -> None:
    metadata = {**llama_metadata(), "tokenizer.ggml.tokens": ["x"] * 159}
    with pytest.raises(WeightFileError, match="has 160 rows, the tokenizer 159 tokens"):
        from_gguf(metadata)


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.lists(st.booleans(), max_size=8)
    | st.sampled_from(["linear", "yarn", "longrope", "none"])
)
FACTORS = st.dictionaries(
    st.sampled_from(ROPE_FACTORS), st.lists(st.floats(), min_size=7, max_size=8), max_size=2
)


@settings(max_examples=200, deadline=None)
@given(
    model_type=st.sampled_from(FAMILIES),
    keys=st.data(),
    factors=FACTORS,
    context_length=st.none() | st.integers(1, 1 << 31),
)
def test_any_values_are_accepted_or_refused(
    model_type: str,
    keys: st.DataObject,
    factors: dict[str, list[float]],
    context_length: int | None,
) -> None:
    plain = gguf_metadata(family_config(model_type))
    architecture = plain["general.architecture"]
    known = sorted(GGUF_HONOURED | GGUF_HARMLESS | GGUF_FAMILIES[architecture].keys)
    changes = keys.draw(st.dictionaries(st.sampled_from(known), ANYTHING, min_size=1, max_size=3))
    try:
        result = config_from_gguf(
            plain | {f"{architecture}.{key}": value for key, value in changes.items()},
            tensor_shapes={"token_embd.weight": (96, 64)},
            rope_factors=factors,
            source="model.gguf",
            context_length=context_length,
        )
    except (WeightFileError, UnsupportedModelError):
        return
    assert all(np.isfinite(rope.inv_freq).all() for rope in result.ropes)
