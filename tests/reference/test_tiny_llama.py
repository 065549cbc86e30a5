"""The writers of tiny checkpoints agree with the formats that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rapshee_engine.weights.loader import load_checkpoint
from reference.quant import decode
from reference.tiny_llama import make_config, make_weights, stored_weights, write_gguf_file


@pytest.mark.parametrize(("canonical", "hf", "heads"), [("q", "q_proj", 4), ("k", "k_proj", 2)])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_gguf_rows_that_rotate_together_are_neighbours(
    tmp_path: Path, canonical: str, hf: str, heads: int, kind: str
) -> None:
    config = make_config(attention_bias=True)
    weights = make_weights(config, seed=3)
    path = write_gguf_file(tmp_path / "model.gguf", config, weights)
    entries = {entry.name: entry for entry in load_checkpoint(path).entries}
    entry = entries[f"layers.1.{canonical}.{kind}"]
    data = path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
    stored = decode(data, entry.dtype, entry.shape).reshape(heads, 16, -1)
    original = weights[f"model.layers.1.self_attn.{hf}.{kind}"].reshape(heads, 16, -1)
    np.testing.assert_array_equal(stored[:, 0::2], original[:, :8])
    np.testing.assert_array_equal(stored[:, 1::2], original[:, 8:])


def test_weights_are_a_function_of_the_seed() -> None:
    config = make_config()
    first, again, other = (make_weights(config, seed) for seed in (1, 1, 2))
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, again[name])
        assert not np.array_equal(weight, other[name])


def test_stored_weights_keep_vectors() -> None:
    weights = make_weights(make_config(), seed=1)
    stored = stored_weights(weights, "q4_0")
    np.testing.assert_array_equal(stored["model.norm.weight"], weights["model.norm.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < np.abs(stored[name] - weights[name]).max() < 0.1
