from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import LayerConfig, ModelConfig
from rapshee_engine.models.hf_config import config_from_hf
from rapshee_engine.models.hf_families import HF_FAMILIES
from rapshee_engine.models.known_keys import HF_HONOURED
from reference.golden import TinyLlamaCase, tiny_llama_cases
from reference.tiny_families import FAMILIES, family_config
from reference.tiny_llama import make_config

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.lists(st.integers(0, 1), max_size=6)
    | st.dictionaries(st.sampled_from(["factor", "rope_type", "rope_theta"]), st.floats())
    | st.sampled_from(["dynamic", "linear", "yarn"]).flatmap(
        lambda kind: st.fixed_dictionaries({"rope_type": st.just(kind), "factor": st.floats(0.1)})
    )
)


def from_hf(**changes: Any) -> ModelConfig:
    return config_from_hf(make_config(**changes), "config.json")


def without(key: str, **changes: Any) -> ModelConfig:
    config = make_config(**changes)
    del config[key]
    return config_from_hf(config, "config.json")


def test_llama() -> None:
    config = from_hf()
    assert config.architecture == "llama"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (160, 64, 96)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.max_position, config.rms_norm_eps) == (256, 1e-5)
    assert config.query_scale == 0.25
    assert config.activation == "silu"
    assert config.tie_embeddings
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (False, False, False)
    assert not config.interleaved_qk
    assert config.layers == (LayerConfig(rope=0, window=0),) * 2
    assert len(config.ropes) == 1
    assert config.ropes[0].attention_factor == 1.0


@pytest.mark.parametrize("case", tiny_llama_cases(), ids=lambda case: case.name)
def test_frequencies_are_those_of_transformers(case: TinyLlamaCase) -> None:
    (rope,) = config_from_hf(case.config, "config.json").ropes
    # At most two units in the last place: libraries round float32 powers differently.
    np.testing.assert_allclose(np.float32(rope.inv_freq), case.inv_freq, rtol=2.4e-7)


def test_defaults_are_those_of_transformers() -> None:
    assert without("num_key_value_heads").num_kv_heads == 4
    assert without("rms_norm_eps").rms_norm_eps == 1e-6
    assert without("tie_word_embeddings").tie_embeddings is False
    assert without("max_position_embeddings").max_position == 2048
    assert without("rope_theta").ropes == from_hf(rope_theta=10_000.0).ropes
    assert without("hidden_act").activation == "silu"
    mistral = without("num_key_value_heads", model_type="mistral", num_attention_heads=8)
    assert mistral.num_kv_heads == 8
    assert mistral.layers[0].window == 4096


def test_head_dim() -> None:
    assert from_hf(head_dim=32).head_dim == 32
    assert from_hf(head_dim=None).head_dim == 16
    assert from_hf(head_dim=32).query_scale == 32**-0.5


def test_biases() -> None:
    config = from_hf(attention_bias=True)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, True, False)
    config = from_hf(mlp_bias=True)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (False, False, True)


def test_window() -> None:
    assert from_hf(model_type="mistral", sliding_window=7).layers[1].window == 7
    assert from_hf(model_type="mistral", sliding_window=None).layers[1].window == 0
    assert from_hf(sliding_window=None).layers[1].window == 0


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_rope_spellings_agree(spelling: str) -> None:
    scaling = {spelling: "linear", "factor": 2.0}
    old = from_hf(rope_theta=5000.0, rope_scaling=scaling)
    new = without("rope_theta", rope_parameters={"rope_theta": 5000.0, **scaling})
    assert old == new
    assert old.ropes[0].inv_freq[0] == 0.5


def test_both_rope_types_may_be_given_if_equal() -> None:
    scaling = {"type": "linear", "rope_type": "linear", "factor": 2.0}
    assert from_hf(rope_scaling=scaling) == from_hf(rope_scaling={"type": "linear", "factor": 2})
    with pytest.raises(UnsupportedModelError, match=r"rope_scaling\.rope_type = 'llama3'"):
        from_hf(rope_scaling={**scaling, "rope_type": "llama3"})


def test_harmless_keys_are_accepted() -> None:
    plain = from_hf()
    assert plain == from_hf(
        _name_or_path="x",
        architectures=["LlamaForCausalLM"],
        attention_dropout=0.1,
        dtype="bfloat16",
        initializer_range=0.02,
        is_llama_config=True,
        pad_token_id=0,
        partial_rotary_factor=1,
        pretraining_tp=1,
        rope_interleaved=False,
        rope_scaling=None,
        transformers_version="5.0.0",
        use_cache=True,
        unknown_but_null=None,
    )


def qwen3(**changes: Any) -> ModelConfig:
    return from_hf(model_type="qwen3", **changes)


def test_qwen3() -> None:
    config = qwen3()
    assert config.architecture == "qwen3"
    assert config.qk_norm == "head"
    assert (config.head_dim, config.query_scale) == (128, 128**-0.5)  # whatever the width
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (False, False, False)
    assert not config.interleaved_qk
    assert config.layers == (LayerConfig(),) * 2
    assert from_hf().qk_norm == "none"


def test_qwen3_defaults_are_those_of_transformers() -> None:
    many_heads = without("num_key_value_heads", model_type="qwen3", num_attention_heads=64)
    assert many_heads.num_kv_heads == 32
    assert qwen3(num_key_value_heads=None).num_kv_heads == 4
    assert without("max_position_embeddings", model_type="qwen3").max_position == 32_768
    assert qwen3(attention_bias=True).qkv_bias


def windows(**changes: Any) -> list[int]:
    return [layer.window for layer in qwen3(num_hidden_layers=3, **changes).layers]


def test_qwen3_windows() -> None:
    on = {"use_sliding_window": True, "sliding_window": 9}
    assert windows(sliding_window=9) == windows(sliding_window=None) == [0, 0, 0]
    assert windows(sliding_window=9, max_window_layers=0, use_sliding_window=False) == [0, 0, 0]
    assert windows(**on) == [0, 0, 0]  # from layer 28 on, unless it says otherwise
    assert windows(**on, max_window_layers=1) == [0, 9, 9]
    assert windows(use_sliding_window=True, max_window_layers=2) == [0, 0, 4096]
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(**on, max_window_layers=1, layer_types=types) == [9, 0, 9]
    assert windows(layer_types=["full_attention"] * 3) == [0, 0, 0]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt_neox"}, "model_type = 'gpt_neox' is not supported; supported: llama"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"sliding_window": 16}, "sliding_window = 16"),
        ({"logits_scaling": 8.0}, "logits_scaling = 8.0 is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias = True"),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling.type = 'mrope'"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type = 'proportional'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling.factor"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}, "attention_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta = 5.0"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": LLAMA3}, "rope_scaling"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias = True"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"use_sliding_window": False}, "use_sliding_window = False is not known"),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        from_hf(**changes)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_sizes_are_required_and_checked(key: str) -> None:
    with pytest.raises(WeightFileError, match=f"config.json: {key} is missing"):
        without(key)
    for value in (0, -1, 2.0, "2", True, 1 << 40, [2]):
        with pytest.raises(WeightFileError, match=f"{key} must be an integer from 1 to"):
            from_hf(**{key: value})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ({"num_key_value_heads": 8}, "4 heads cannot share 8 key-value heads"),
        ({"hidden_size": 66}, "width of 66 cannot be split into 4 heads"),
        ({"hidden_size": 60}, "must be even and at most 4096 wide, got 15"),
        ({"head_dim": 15}, "must be even and at most 4096 wide, got 15"),
        ({"head_dim": 0}, "head_dim must be an integer"),
        ({"hidden_size": 1 << 16}, "must be even and at most 4096 wide, got 16384"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a number"),
        ({"rope_theta": math.inf}, "rope_theta must be a number"),
        ({"rope_theta": -1.0}, "rope_theta must be a number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be an integer"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be an integer"),
        ({"model_type": "mistral", "sliding_window": "all"}, "sliding_window must be an integer"),
        ({"model_type": 3}, "model_type must be a string"),
        ({"model_type": None}, "model_type is missing"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "a list of 2 types"),
        ({"model_type": "qwen3", "layer_types": "full_attention"}, "a list of 2 types"),
        ({"model_type": "qwen3", "use_sliding_window": 1}, "use_sliding_window must be true"),
        ({"model_type": "qwen3", "max_window_layers": -1}, "max_window_layers must be an integer"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor must be"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor must be above"),
        (
            {"rope_theta": 1e-30, "rope_scaling": {"type": "linear", "factor": 1e-30}},
            "rotary frequencies are not finite",
        ),
    ],
)
def test_refuses_impossible_values(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason) as caught:
        from_hf(**changes)
    assert caught.value.file == "config.json"


@settings(max_examples=200, deadline=None)
@given(
    model_type=st.sampled_from(FAMILIES),
    keys=st.data(),
    context_length=st.none() | st.integers(1, 1 << 31),
)
def test_any_values_are_accepted_or_refused(
    model_type: str, keys: st.DataObject, context_length: int | None
) -> None:
    family = HF_FAMILIES[model_type]
    known = sorted(HF_HONOURED | family.keys | family.neutral.keys())
    changes = keys.draw(st.dictionaries(st.sampled_from(known), ANYTHING, min_size=1, max_size=3))
    config = {**family_config(model_type), **changes, "model_type": model_type}
    try:
        result = config_from_hf(config, "config.json", context_length=context_length)
    except (WeightFileError, UnsupportedModelError):
        return
    assert all(np.isfinite(rope.inv_freq).all() for rope in result.ropes)
