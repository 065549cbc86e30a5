"""Whole models in each weight format against the numpy model on the numbers that the file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from reference.llama import forward
from reference.quant import LOW_BIT
from reference.steps import Chunk, make_runner, make_step
from reference.tiny_llama import make_config, make_weights, stored_weights, write_gguf_file

# Rows of whole blocks of 256; a head of its own, so that logits are about 1.
CONFIG = make_config(hidden_size=256, intermediate_size=512, tie_word_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], 40).tolist()
MOST_ERROR = 1e-3
"""Bound on |delta log-probability| with float activations and a float cache."""
MEAN_ERROR = 0.03
"""Bound on its mean with those that the kernels take."""

Doubles = npt.NDArray[np.float64]


def expected(dtype: str) -> Doubles:
    """Log-probabilities [T, V]."""
    logits = forward(stored_weights(make_weights(CONFIG, 1), dtype), CONFIG, TOKENS)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def actual(folder: Path, stored: str, **options: Any) -> Doubles:
    path = write_gguf_file(folder / "tiny.gguf", CONFIG, make_weights(CONFIG, 1), dtype=stored)
    runner = make_runner(path, **options)
    step = make_step([Chunk(TOKENS, 0, [2, 0, 1], targets=[0] * len(TOKENS))])
    step["num_logprobs"][:] = runner.vocab_size
    output = runner.collect(runner.launch(**step))
    runner.close()
    by_id = np.argsort(output.top_ids, axis=-1)
    return np.take_along_axis(output.top_logprobs, by_id, axis=-1).astype(np.float64)


@pytest.mark.parametrize("dtype", LOW_BIT)
def test_float_activations(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAPSHEE_CPU_ACT", "f32")
    error = np.abs(actual(tmp_path, dtype, dtype="float32") - expected(dtype))
    assert error.max() <= MOST_ERROR


@pytest.mark.parametrize("dtype", LOW_BIT)
def test_what_the_kernels_take(device: str, dtype: str, tmp_path: Path) -> None:
    error = np.abs(actual(tmp_path, dtype, device=device) - expected(dtype))
    assert error.mean() <= MEAN_ERROR


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_the_cache_alone(kv_dtype: str, tmp_path: Path) -> None:
    """Of a model that is computed in float32."""
    error = np.abs(actual(tmp_path, "f32", kv_dtype=kv_dtype) - expected("f32"))
    assert 0 < error.mean() <= 0.01


def test_formats_may_be_mixed(device: str, tmp_path: Path) -> None:
    """Each product takes its rows in the form that its own matrix wants."""
    dtypes = {"q_proj": "q5_0", "k_proj": "bf16", "v_proj": "q6_k", "gate_proj": "q2_k", "up_proj":
              "f32"}  # fmt: skip
    path = tmp_path / "mixed.gguf"
    write_gguf_file(path, CONFIG, make_weights(CONFIG, 1), dtype="q4_k", dtypes=dtypes)
    runner = make_runner(path, device=device)
    step = make_step([Chunk(TOKENS, 0, [2, 0, 1])], num_logprobs=1)
    assert np.isfinite(runner.collect(runner.launch(**step)).logprobs).all()
    assert runner.weight_bytes < path.stat().st_size * 1.1
    runner.close()
