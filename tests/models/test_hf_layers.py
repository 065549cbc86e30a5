from __future__ import annotations

from typing import Any

import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.hf_config import config_from_hf
from reference.tiny_families import family_config


def layers(model_type: str, num_layers: int, **changes: Any) -> list[tuple[int, int]]:
    """(rope, window) of each layer."""
    config = family_config(model_type, num_hidden_layers=num_layers, **changes)
    return [(at.rope, at.window) for at in config_from_hf(config, "config.json").layers]


def test_one_window_for_all() -> None:
    assert layers("mistral", 2, sliding_window=7) == [(0, 7)] * 2
    assert layers("mistral", 2) == [(0, 4096)] * 2
    assert layers("mistral", 2, sliding_window=None) == [(0, 0)] * 2
    assert layers("phi3", 2) == [(0, 0)] * 2
    assert layers("phi3", 2, sliding_window=7) == [(0, 7)] * 2


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen(model_type: str) -> None:
    on = {"use_sliding_window": True, "sliding_window": 9}
    assert layers(model_type, 3, sliding_window=9) == [(0, 0)] * 3
    assert layers(model_type, 3, **on) == [(0, 0)] * 3  # from layer 28 on
    assert layers(model_type, 3, **on, max_window_layers=1) == [(0, 0), (0, 9), (0, 9)]
    types = ["sliding_attention", "full_attention"]
    assert layers(model_type, 2, **on, layer_types=types) == [(0, 9), (0, 0)]


def test_gemma2_alternates() -> None:
    assert layers("gemma2", 3) == [(0, 7), (0, 0), (0, 7)]
    types = ["full_attention", "sliding_attention", "full_attention"]
    assert layers("gemma2", 3, layer_types=types) == [(0, 0), (0, 7), (0, 0)]
    config = family_config("gemma2")
    del config["sliding_window"]
    assert config_from_hf(config, "config.json").layers[0].window == 4096


def test_gemma3_has_a_rope_for_layers_with_a_window() -> None:
    assert layers("gemma3_text", 7) == [(1, 7)] * 5 + [(0, 0), (1, 7)]
    assert layers("gemma3_text", 4, sliding_window_pattern=2) == [(1, 7), (0, 0)] * 2
    assert layers("gemma3_text", 2, sliding_window_pattern=1) == [(0, 0)] * 2
    types = ["full_attention", "sliding_attention"]
    written = {"layer_types": types, "_sliding_window_pattern": 2}
    assert layers("gemma3_text", 2, **written) == [(0, 0), (1, 7)]
    assert layers("gemma3_text", 7, _sliding_window_pattern=6) == layers("gemma3_text", 7)


def test_smollm3_leaves_rotations_out() -> None:
    assert layers("smollm3", 5) == [(0, 0)] * 3 + [(-1, 0), (0, 0)]
    assert layers("smollm3", 4, no_rope_layer_interval=2) == [(0, 0), (-1, 0)] * 2
    assert layers("smollm3", 2, no_rope_layers=[0, 1, 0]) == [(-1, 0), (0, 0)]
    window = {"use_sliding_window": True, "sliding_window": 9}
    assert layers("smollm3", 2, no_rope_layers=[0, 1], **window) == [(-1, 9), (0, 0)]
    assert layers("smollm3", 2, no_rope_layers=[0, 1], use_sliding_window=True)[0] == (-1, 0)
    types = ["full_attention", "sliding_attention"]
    listed = layers("smollm3", 2, no_rope_layers=[0, 1], layer_types=types, **window)
    assert listed == [(-1, 0), (0, 9)]


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "granite"])
def test_others_have_no_windows(model_type: str) -> None:
    assert layers(model_type, 2, sliding_window=None) == [(0, 0)] * 2
    with pytest.raises(UnsupportedModelError, match="sliding_window = 7"):
        layers(model_type, 2, sliding_window=7)


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ("gemma3_text", {"_sliding_window_pattern": 4}, "_sliding_window_pattern = 4"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("gemma2", {"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_refuses_by_name(model_type: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        layers(model_type, 2, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gemma2", {"sliding_window": 0}, "sliding_window must be an integer"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "pattern must be an integer"),
        ("gemma2", {"layer_types": ["full_attention"]}, "a list of 2 types"),
        ("smollm3", {"no_rope_layers": [1]}, "a list of at least 2 numbers"),
        ("smollm3", {"no_rope_layers": [1, 2]}, "a list of 0 and 1"),
        ("smollm3", {"no_rope_layers": [1, True]}, "a list of 0 and 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "interval must be an integer"),
    ],
)
def test_refuses_impossible_values(model_type: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason):
        layers(model_type, 2, **changes)
