"""Other devices against the CPU, on the same bfloat16 checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from reference.devices import OTHER_DEVICES, is_emulated
from reference.steps import Chunk, make_runner, make_step
from reference.tiny_llama import make_config, make_weights, write_hf_folder

MEAN_ERROR = 0.02
"""Bound on the mean |delta log-probability|: activations and caches are rounded differently."""
CLEAR_MARGIN = 0.05
"""Gap of the two largest log-probabilities from which on the arg-max has to agree."""

VOCAB = 160


def logprobs(
    runner: _core.ModelRunner, token_ids: list[int], chunk: int
) -> npt.NDArray[np.float64]:
    """[T, V] after each of the tokens, which are computed in chunks."""
    parts = []
    for start in range(0, len(token_ids), chunk):
        ids = token_ids[start : start + chunk]
        step = make_step([Chunk(ids, start, range(20), targets=[0] * len(ids))], num_logprobs=VOCAB)
        out = runner.collect(runner.launch(**step))
        part = np.empty((len(ids), VOCAB))
        np.put_along_axis(part, out.top_ids.astype(np.intp), out.top_logprobs, axis=1)
        parts.append(part)
    return np.concatenate(parts)


@pytest.mark.parametrize("device", OTHER_DEVICES)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_teacher_forced(device: str, model_type: str, tmp_path: Path) -> None:
    family = {"mistral": {"sliding_window": 30}, "llama": {"attention_bias": True}}
    config = make_config(
        model_type=model_type,
        hidden_size=128,
        head_dim=64,
        max_position_embeddings=320,
        **family.get(model_type, {}),
    )
    path = write_hf_folder(tmp_path, config, make_weights(config, seed=6), dtype="bf16")
    length = 48 if is_emulated(device) else 300
    token_ids = np.random.default_rng(7).integers(0, VOCAB, length).tolist()
    results = []
    for name in ("cpu", device):
        runner = make_runner(path, device=name)
        assert runner.kv_dtype == "bfloat16"
        # A prompt in one piece, then token by token.
        long, short = token_ids[: length - 8], token_ids[:8]
        results.append(
            np.concatenate([logprobs(runner, long, len(long)), logprobs(runner, short, 1)])
        )
        runner.close()
    on_cpu, there = results
    assert np.abs(on_cpu - there).mean() <= MEAN_ERROR
    best = np.sort(on_cpu, axis=1)
    clear = best[:, -1] - best[:, -2] > CLEAR_MARGIN
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(on_cpu.argmax(axis=1)[clear], there.argmax(axis=1)[clear])


@pytest.mark.parametrize("device", OTHER_DEVICES)
@pytest.mark.parametrize(
    ("stored", "dtype", "kv_dtype"),
    [
        ("f32", "auto", "bfloat16"),
        ("f16", "auto", "bfloat16"),
        ("bf16", "bfloat16", "bfloat16"),
        ("f16", "float16", "float16"),
    ],
)
def test_dtypes(device: str, stored: str, dtype: str, kv_dtype: str, tmp_path: Path) -> None:
    config = make_config()
    path = write_hf_folder(tmp_path, config, make_weights(config, seed=6), dtype=stored)
    runner = make_runner(path, device=device, dtype=dtype)
    assert runner.kv_dtype == kv_dtype
    assert np.isfinite(logprobs(runner, [1, 2, 3], 3)).all()
    runner.close()
