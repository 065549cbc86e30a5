from __future__ import annotations

from typing import Any

import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.models.gguf_config import config_from_gguf
from rapshee_engine.models.gguf_families import GGUF_FAMILIES
from rapshee_engine.models.hf_config import config_from_hf
from reference.tiny_families import FAMILIES, family_config, gguf_metadata

SHAPES = {"token_embd.weight": (96, 64)}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def model(model_type: str, **changes: Any) -> ModelConfig:
    """``changes`` to the metadata, dots written as two underscores."""
    architecture = ARCHITECTURES.get(model_type, model_type)
    metadata = gguf_metadata(family_config(model_type))
    metadata |= {f"{architecture}.{key.replace('__', '.')}": v for key, v in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return config_from_gguf(metadata, tensor_shapes=SHAPES, rope_factors={}, source="model.gguf")


def layers(model_type: str, **changes: Any) -> list[tuple[int, int]]:
    """(rope, window) of each layer."""
    return [(layer.rope, layer.window) for layer in model(model_type, **changes).layers]


def test_every_architecture_is_tested() -> None:
    assert {ARCHITECTURES.get(name, name) for name in FAMILIES} == set(GGUF_FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_formats_say_the_same(model_type: str) -> None:
    hf = config_from_hf(family_config(model_type), "config.json")
    gguf = model(model_type)
    for name in (
        "activation", "attn_softcap", "embed_scale", "final_softcap", "head_dim", "layers",
        "logit_scale", "max_position", "post_norm", "pre_norm", "qk_norm", "query_scale",
        "residual_scale", "rms_norm_eps", "ropes",
    ):  # fmt: skip
        if (model_type, name) != ("mistral", "layers"):  # whose absent window has a default
            assert getattr(gguf, name) == getattr(hf, name), name
    # The file has the 1 of the norms in their weights.
    assert not gguf.norm_zero_centered
    assert gguf.interleaved_qk == (gguf.architecture in ("llama", "smollm3", "granite"))


@pytest.mark.parametrize(
    ("model_type", "num_layers", "width"),
    [("gemma2", 26, 16), ("gemma2", 46, 32), ("gemma3_text", 34, 16), ("gemma3_text", 62, 32)],
)
def test_gemma_27b_has_a_query_scale_of_its_own(
    model_type: str, num_layers: int, width: int
) -> None:
    # Heads of 16; a head's share of the width is 32.
    changes = {"block_count": num_layers, "attention__head_count": 2}
    assert model(model_type, **changes).query_scale == width**-0.5


def test_gemma_caps_have_defaults() -> None:
    config = model("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.attn_softcap, config.final_softcap) == (50.0, 30.0)
    assert model("gemma3_text", final_logit_softcapping=9.0).final_softcap == 9.0


def test_gemma_layers() -> None:
    assert layers("gemma2") == [(0, 7), (0, 0), (0, 7)]
    assert layers("gemma2", attention__sliding_window=None)[0] == (0, 4096)
    assert layers("gemma3_text") == [(1, 7)] * 5 + [(0, 0), (1, 7)]
    assert layers("gemma3_text", attention__sliding_window=None) == [(0, 0)] * 7
    pattern = {"attention__sliding_window_pattern": 2, "block_count": 4}
    assert layers("gemma3_text", **pattern) == [(1, 7), (0, 0)] * 2
    listed = {"attention__sliding_window_pattern": [False, True], "block_count": 2}
    assert layers("gemma3_text", **listed) == [(0, 0), (1, 7)]


def test_other_layers() -> None:
    assert layers("smollm3") == [(0, 0)] * 3 + [(-1, 0), (0, 0)]
    assert layers("phi3", attention__sliding_window=7) == [(0, 7)] * 2
    assert layers("phi3", attention__sliding_window=0) == [(0, 0)] * 2
    assert layers("granite", rope__scaling__finetuned=True) == [(0, 0)] * 2
    assert layers("granite", rope__scaling__finetuned=False) == [(-1, 0)] * 2
    assert layers("llama", rope__scaling__finetuned=False) == [(0, 0)] * 2


def test_granite_scales_have_defaults() -> None:
    config = model(
        "granite", embedding_scale=None, residual_scale=None, logit_scale=None,
        attention__scale=None,
    )  # fmt: skip
    assert (config.embed_scale, config.residual_scale, config.logit_scale) == (1.0, 1.0, 1.0)
    assert config.query_scale == 0.25
    assert model("granite", logit_scale=8.0).logit_scale == 0.125


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("olmo2", {"attention__sliding_window": 7}, "olmo2.attention.sliding_window = 7"),
        ("smollm3", {"attention__sliding_window": 7}, "smollm3.attention.sliding_window = 7"),
        ("granite", {"attention__sliding_window": 7}, "granite.attention.sliding_window = 7"),
        ("qwen2", {"attention__sliding_window": 7}, "qwen2.attention.sliding_window = 7"),
        ("qwen2", {"rope__dimension_count": 8}, "qwen2.rope.dimension_count = 8"),
        ("olmo2", {"attention__sliding_window_pattern": 4}, "sliding_window_pattern = 4"),
        ("llama", {"logit_scale": 2.0}, "llama.logit_scale = 2.0"),
        ("gemma2", {"rope__freq_base_swa": 5.0}, "gemma2.rope.freq_base_swa = 5.0"),
        ("smollm3", {"attention__rope_pattern": [True]}, "attention.rope_pattern"),
    ],
)
def test_refuses_by_name(model_type: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        model(model_type, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("gemma2", {"attention__sliding_window": 0}, "sliding_window must be an integer"),
        ("gemma3_text", {"attention__sliding_window_pattern": 0}, "pattern must be an integer"),
        ("gemma3_text", {"attention__sliding_window_pattern": [True]}, "7 booleans"),
        ("gemma3_text", {"attention__sliding_window_pattern": [1] * 7}, "7 booleans"),
        ("granite", {"attention__scale": 0.0}, "attention.scale must be a number"),
        ("granite", {"rope__scaling__finetuned": 1}, "finetuned must be true or false"),
    ],
)
def test_refuses_impossible_values(model_type: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(WeightFileError, match=reason):
        model(model_type, **changes)
