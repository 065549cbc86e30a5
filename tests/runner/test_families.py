"""Every family and rotary scaling against transformers in float32, on the committed goldens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from reference.devices import is_emulated, native_dtype
from reference.golden import FamilyCase, family_cases
from reference.steps import Chunk, make_runner, make_step
from reference.tiny_families import family_weights, write_family_gguf
from reference.tiny_llama import write_hf_folder

Doubles = npt.NDArray[np.float64]

CASES = family_cases()
GGUF_CASES = [case for case in CASES if case.gguf]
NAMED = {"ids": lambda case: case.name}

# Of a log-probability: at most in float32; on average with all in bfloat16, whose golden is the
# unrounded model's.
LARGEST_ERROR = 1e-3
MEAN_ERROR_BF16 = 0.05


def log_softmax(logits: npt.NDArray[np.float32]) -> Doubles:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def all_logprobs(runner: _core.ModelRunner, token_ids: tuple[int, ...], chunk: int) -> Doubles:
    """[T, V] log-probabilities after each token, computed in chunks of the prompt."""
    parts = []
    dropped = [0] * len(runner.kv_windows)
    for start in range(0, len(token_ids), chunk):
        ids = token_ids[start : start + chunk]
        step = make_step([Chunk(ids, start, [5, 2, 7], [0] * len(ids), dropped)])
        step["num_logprobs"][:] = runner.vocab_size
        output = runner.collect(runner.launch(**step))
        by_id = np.argsort(output.top_ids, axis=-1)
        parts.append(np.take_along_axis(output.top_logprobs, by_id, axis=-1))
    return np.concatenate(parts).astype(np.float64)


def check(path: Path, case: FamilyCase, device: str) -> None:
    """In prefill, in chunks and in decode: as transformers has it, and always the same bits."""
    runner = make_runner(path, context_length=case.context_length, device=device)
    chunks = (len(case.token_ids), 7) if is_emulated(device) else (len(case.token_ids), 7, 1)
    results = [all_logprobs(runner, case.token_ids, chunk) for chunk in chunks]
    runner.close()
    errors = np.abs(results[0] - log_softmax(case.logits))
    if native_dtype(device) == "f32":
        assert errors.max() <= LARGEST_ERROR
    else:
        assert errors.mean() <= MEAN_ERROR_BF16
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("case", CASES, **NAMED)
def test_hugging_face_checkpoints(case: FamilyCase, kernels: str, tmp_path: Path) -> None:
    weights = family_weights(case.config, case.seed)
    path = write_hf_folder(tmp_path, case.config, weights, native_dtype(kernels))
    check(path, case, kernels)


@pytest.mark.parametrize("case", GGUF_CASES, **NAMED)
def test_gguf_files(case: FamilyCase, device: str, tmp_path: Path) -> None:
    weights = family_weights(case.config, case.seed)
    path = write_family_gguf(tmp_path / "tiny.gguf", case.config, weights, native_dtype(device))
    check(path, case, device)
