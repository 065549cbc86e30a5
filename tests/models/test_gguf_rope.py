from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import ModelConfig, RopeConfig
from rapshee_engine.models.gguf_config import config_from_gguf
from rapshee_engine.models.hf_config import config_from_hf
from reference.tiny_families import family_config, gguf_metadata

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
BOTH = {LONG: [2.0] * 8, SHORT: [1.5] * 8}
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}


def model(
    architecture: str = "qwen2",
    factors: Mapping[str, Sequence[float]] | None = None,
    length: int | None = None,
    scaling: Mapping[str, Any] | None = None,
    **changes: Any,
) -> ModelConfig:
    """``scaling``: below ``rope.scaling.``; ``changes``: below the architecture."""
    metadata = gguf_metadata(
        family_config("gemma3_text" if architecture == "gemma3" else architecture)
    )
    keys = {f"rope.scaling.{key}": value for key, value in (scaling or {}).items()}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata |= {f"{architecture}.{key}": value for key, value in keys.items()}
    return config_from_gguf(
        metadata,
        tensor_shapes={"token_embd.weight": (96, 64)},
        rope_factors=factors or {},
        source="model.gguf",
        context_length=length,
    )


def rope(**options: Any) -> RopeConfig:
    (only,) = model(**options).ropes
    return only


def from_hf(**scaling: Any) -> RopeConfig:
    config = config_from_hf(family_config("qwen2", rope_scaling=scaling), "config.json")
    (only,) = config.ropes
    return only


def test_yarn_is_that_of_transformers() -> None:
    hf = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert rope(scaling=YARN) == from_hf(**hf)
    options = {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0, "yarn_attn_factor": 1.5}
    expected = from_hf(**hf, beta_fast=8.0, beta_slow=2.0, attention_factor=1.5)
    assert rope(scaling={**YARN, **options}) == expected
    multiplied = rope(scaling={**YARN, "yarn_log_multiplier": 0.5})
    assert multiplied == from_hf(**hf, mscale=1.0, mscale_all_dim=0.5)
    assert rope(scaling={**YARN, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}) == from_hf(
        **hf
    )


def test_yarn_reaches_as_far_as_it_stretches() -> None:
    assert model(scaling=YARN).max_position == 256
    assert model(scaling={"type": "yarn", "factor": 4.0}).max_position == 1024


def test_longrope_has_short_factors_up_to_the_original_length() -> None:
    plain = np.float32(rope().inv_freq)
    scaling = {"original_context_length": 64, "attn_factor": 1.2}
    short = rope(factors=BOTH, length=64, scaling=scaling)
    long = rope(factors=BOTH, length=65, scaling=scaling)
    np.testing.assert_allclose(plain / np.float32(short.inv_freq), 1.5, rtol=1e-6)
    np.testing.assert_allclose(plain / np.float32(long.inv_freq), 2.0, rtol=1e-6)
    assert short.attention_factor == long.attention_factor == 1.2
    assert rope(factors=BOTH, scaling={**scaling, "type": "longrope"}) == long
    # Without an original length it is the model's: never exceeded.
    assert rope(factors=BOTH, scaling={"attn_factor": 1.2}) == short


def test_a_factor_without_a_type_stretches_all() -> None:
    assert rope(scaling={"factor": 4.0}) == from_hf(rope_type="linear", factor=4.0)
    assert rope(scaling={"type": "none", "factor": 4.0}) == rope()


def test_the_attention_factor_counts_with_every_type() -> None:
    assert rope(scaling={"attn_factor": 1.5}).attention_factor == 1.5
    assert rope(scaling={**YARN, "attn_factor": 2.0}).attention_factor == pytest.approx(
        2 * 1.1386294
    )


def test_phi3_rotates_a_part_of_a_head() -> None:
    assert len(rope(architecture="phi3", rope__dimension_count=12).inv_freq) == 6
    # Brought from neighbours to halves of a head, what does not rotate lies between.
    padded = rope(architecture="llama", rope__dimension_count=12).inv_freq
    assert padded[6:] == (0.0, 0.0)


def test_gemma3_scales_layers_without_a_window_alone() -> None:
    scaled = model(architecture="gemma3", scaling={"type": "linear", "factor": 8.0}).ropes
    plain = model(architecture="gemma3").ropes
    assert scaled[1] == plain[1]
    np.testing.assert_allclose(np.float32(scaled[0].inv_freq) * 8, plain[0].inv_freq)
    assert model(architecture="gemma3", rope__freq_base_swa=50.0).ropes[1] != plain[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scaling": {**YARN, "yarn_ext_factor": 0.5}}, "rope.scaling.yarn_ext_factor = 0.5"),
        ({"scaling": {"type": "ntk"}}, "rope.scaling.type = 'ntk'"),
        ({"scaling": {"alpha": 1000.0}}, "rope.scaling.alpha"),
        ({"factors": BOTH, "scaling": {"type": "linear", "factor": 2.0}}, "type = 'linear'"),
        ({"factors": BOTH, "scaling": {"factor": 2.0}}, "rope.scaling.factor = 2.0"),
    ],
)
def test_refuses_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        model(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scaling": {"type": "yarn"}}, "rope.scaling.factor is missing"),
        ({"scaling": {"type": "longrope"}}, f"'{LONG}': is missing"),
        ({"factors": {LONG: [1.0] * 8}}, f"'{SHORT}': is missing"),
        ({"factors": {**BOTH, SHORT: [1.0] * 7}}, f"'{SHORT}': must have 8 values, got 7"),
        ({"factors": {**BOTH, LONG: [0.0] * 8}}, f"'{LONG}': its values must be finite"),
        ({"factors": {**BOTH, "rope_freqs.weight": [1.0] * 8}}, "'rope_freqs.weight': stands"),
        ({"scaling": YARN, "rope__freq_base": 1.0}, "rope.freq_base must be above 1"),
        ({"scaling": {**YARN, "original_context_length": 0}}, "must be an integer"),
    ],
)
def test_refuses_impossible_values(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason):
        model(**options)
