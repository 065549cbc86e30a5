from __future__ import annotations

from typing import Any

import pytest

from rapshee_engine.config import EngineConfig
from rapshee_engine.errors import ConfigError


def test_a_model_is_all_that_is_needed() -> None:
    config = EngineConfig(model="model.gguf")
    assert config.enable_prefix_caching
    assert config.deterministic
    assert config.max_num_batched_tokens >= config.max_num_seqs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("model", None),
        ("device", "tpu"),
        ("device", "cuda:"),
        ("device", "cuda:-1"),
        ("device", " cuda"),
        ("device", None),
        ("dtype", "float64"),
        ("dtype", None),
        ("kv_dtype", "float16"),
        ("kv_dtype", None),
        ("quantize", "q5"),
        ("quantize", "none"),
        ("load_format", "pickle"),
        ("max_num_seqs", 0),
        ("max_num_seqs", 4097),
        ("max_num_seqs", 1.0),
        ("max_num_seqs", True),
        ("max_num_batched_tokens", 0),
        ("max_num_batched_tokens", "512"),
        ("max_model_len", 0),
        ("max_model_len", -1),
        ("kv_cache_memory_bytes", 0),
        ("kv_cache_memory_bytes", 1 << 63),
        ("block_size", 0),
        ("threads", 0),
        ("threads", 1.5),
        ("threads", 1025),
        ("enable_prefix_caching", "no"),
        ("async_scheduling", 1),
        ("deterministic", 1),
        ("chat_template", 5),
    ],
)
def test_a_wrong_option_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{"model": "model.gguf", name: value})


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:12", "cuda-emu", "cuda-emu:0"])
def test_devices_are_looked_for_later(device: str) -> None:
    assert EngineConfig(model="model.gguf", device=device).device == device


def test_every_running_sequence_needs_a_token_of_the_budget() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        EngineConfig(model="model.gguf", max_num_seqs=65, max_num_batched_tokens=64)
    EngineConfig(model="model.gguf", max_num_seqs=64, max_num_batched_tokens=64)
