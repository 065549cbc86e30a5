from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import ModelConfig, RopeConfig
from rapshee_engine.models.hf_config import config_from_hf
from reference.tiny_families import family_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "long_factor": [2.0] * 8,
    "short_factor": [1.5] * 8,
    "original_max_position_embeddings": 64,
}


def model(
    model_type: str = "llama", context_length: int | None = None, **changes: Any
) -> ModelConfig:
    config = family_config(model_type, **changes)
    return config_from_hf(config, "config.json", context_length=context_length)


def rope(scaling: dict[str, Any] | None = None, length: int | None = None) -> RopeConfig:
    (only,) = model(rope_scaling=scaling, context_length=length).ropes
    return only


# Lengths


def test_dynamic_follows_the_length_that_the_model_is_loaded_for() -> None:
    assert rope(DYNAMIC) == rope(DYNAMIC, 100) == rope(DYNAMIC, 256) == rope()
    longer, longest = rope(DYNAMIC, 300), rope(DYNAMIC, 512)
    assert len({longer.inv_freq, longest.inv_freq, rope().inv_freq}) == 3
    assert longer.attention_factor == longest.attention_factor == 1.0


def test_dynamic_reaches_beyond_the_trained_length_where_it_is_asked_to() -> None:
    def reach(length: int | None) -> int:
        return model(rope_scaling=DYNAMIC, context_length=length).max_position

    assert reach(None) == reach(10) == 256
    assert reach(300) == 300
    assert reach(512) == reach(513) == 512  # beyond, the engine refuses


def test_longrope_has_short_factors_up_to_the_original_length() -> None:
    plain = np.float32(rope().inv_freq)
    short, long = rope(LONGROPE, 64), rope(LONGROPE, 65)
    np.testing.assert_allclose(plain / np.float32(short.inv_freq), 1.5, rtol=1e-6)
    np.testing.assert_allclose(plain / np.float32(long.inv_freq), 2.0, rtol=1e-6)
    assert rope(LONGROPE) == long
    assert short.attention_factor == long.attention_factor == pytest.approx(1.1547005)
    assert model(rope_scaling=LONGROPE, context_length=64).max_position == 256


def test_yarn_does_not_depend_on_the_length() -> None:
    assert rope(YARN) == rope(YARN, 10)
    assert model(rope_scaling=YARN).max_position == 256
    # Files that give the original length as the model's.
    stretched = {**YARN, "original_max_position_embeddings": 256}
    assert model(rope_scaling=stretched).max_position == 1024
    del stretched["original_max_position_embeddings"]
    assert model(rope_scaling=stretched).max_position == 1024


# Attention factors


def test_attention_factors() -> None:
    assert rope(YARN).attention_factor == pytest.approx(1.1386294)
    assert rope({**YARN, "attention_factor": 1.5}).attention_factor == 1.5
    assert rope({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}).attention_factor == 1.0
    assert rope({**YARN, "mscale": 1.0, "mscale_all_dim": 0}) == rope(YARN)
    assert rope({**LONGROPE, "attention_factor": 1.5}).attention_factor == 1.5
    assert rope({**LONGROPE, "factor": 1.0}).attention_factor == 1.0


def test_a_factor_that_is_left_out_is_the_ratio_of_the_lengths() -> None:
    assert rope({**YARN, "factor": None}) == rope(YARN)
    assert rope({**LONGROPE, "factor": 4.0}) == rope(LONGROPE)


def test_the_original_length_outside_the_section_counts_more() -> None:
    outer = model(rope_scaling=YARN, original_max_position_embeddings=32)
    inner = rope({**YARN, "original_max_position_embeddings": 32})
    assert outer.ropes == (inner,)


# Families


def test_phi3_rotates_a_part_of_a_head() -> None:
    (partial,) = model("phi3", partial_rotary_factor=0.75).ropes
    assert len(partial.inv_freq) == 6
    assert model("phi3").ropes == (rope(),)


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_phi3_means_longrope_by_all_its_names(name: str) -> None:
    scaling = {"type": name, "long_factor": [2.0] * 8, "short_factor": [1.5] * 8}
    phi = {"rope_scaling": scaling, "original_max_position_embeddings": 64}
    assert model("phi3", **phi).ropes == (rope(LONGROPE),)
    config = family_config("phi3", rope_scaling=scaling, max_position_embeddings=8192)
    del config["original_max_position_embeddings"]
    (default,) = config_from_hf(config, "config.json").ropes
    np.testing.assert_allclose(default.attention_factor, (1 + 1 / 12) ** 0.5)  # from 4096


def test_gemma3_has_two_embeddings() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = family_config("gemma3_text", rope_scaling=scaling)
    del config["rope_theta"]
    of_all, of_windows = config_from_hf(config, "config.json").ropes
    assert of_windows == rope()  # by 10,000, and not scaled
    assert of_all.inv_freq[:2] == pytest.approx((1 / 8, 1e6 ** (-1 / 8) / 8))
    (_, other) = model("gemma3_text", rope_local_base_freq=500.0).ropes
    assert other == model(rope_theta=500.0).ropes[0]


def test_gemma3_sections_by_layer_type() -> None:
    old = model(
        "gemma3_text",
        rope_theta=5000.0,
        rope_local_base_freq=500.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = model(
        "gemma3_text",
        rope_theta=None,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    )
    assert old == new


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("phi3", {"rope_scaling": {**LONGROPE, "short_mscale": 1.1}}, "short_mscale"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type = 'linear'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("llama", {"rope_scaling": {**YARN, "extrapolation_factor": 1.0}}, "extrapolation"),
        ("llama", {"rope_scaling": {**DYNAMIC, "alpha": 1000.0}}, "rope_scaling.alpha"),
        ("llama", {"head_dim": 2, "rope_scaling": DYNAMIC}, "head_dim = 2"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {}}, "rope_scaling": YARN},
            "rope_scaling",
        ),
    ],
)
def test_refuses_by_name(model_type: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        model(model_type, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("llama", {"rope_scaling": {**DYNAMIC, "factor": 0.5}}, "factor must be 1 or more"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_scaling.factor is missing"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast must be a number"),
        ("llama", {"rope_scaling": {**YARN, "truncate": 1}}, "truncate must be true or false"),
        ("llama", {"rope_scaling": YARN, "rope_theta": 1.0}, "above 1"),
        (
            "llama",
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings must be an integer",
        ),
        ("llama", {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor must be"),
        ("llama", {"rope_scaling": {**LONGROPE, "short_factor": None}}, "short_factor is missing"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be"),
        ("phi3", {"partial_rotary_factor": 0.2}, "partial_rotary_factor must be"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "must be an object"),
    ],
)
def test_refuses_impossible_values(model_type: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason) as caught:
        model(model_type, **changes)
    assert caught.value.file == "config.json"
