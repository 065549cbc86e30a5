"""The engine against transformers in float32, on the committed goldens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rapshee_engine import LLM, SamplingParams, _core
from reference.devices import TEST_KERNELS, is_emulated
from reference.golden import GoldenText, TinyLlamaCase, smollm2_goldens, tiny_llama_cases
from reference.steps import Chunk, make_runner, make_step
from reference.tiny_llama import make_weights, write_gguf_file, write_hf_folder

ISAS = _core.build_info()["isas"]
FAST_KERNELS = [
    (device, isa)
    for device, isa in TEST_KERNELS
    if not is_emulated(device) and (isa != "scalar" or ISAS == ["scalar"])
]
"""The scalar kernels, two orders slower, are held to the tiny goldens, an emulated device to the
CPU."""

MEAN_ERROR = 0.03
"""Bound on the mean |delta log-probability| with int8 activations on CPU, bfloat16 ones on CUDA."""
CLEAR_MARGIN = 0.1
"""Gap of the two largest logits from which on the arg-max has to agree."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def all_logprobs(runner: _core.ModelRunner, token_ids: tuple[int, ...], chunk: int) -> np.ndarray:
    """[T, V] log-probabilities after each token, computed in chunks of the prompt."""
    parts = []
    blocks = list(range(8))
    dropped = [0] * len(runner.kv_windows)
    for start in range(0, len(token_ids), chunk):
        ids = token_ids[start : start + chunk]
        step = make_step([Chunk(ids, start, blocks, [0] * len(ids), dropped)])
        step["num_logprobs"][:] = runner.vocab_size
        output = runner.collect(runner.launch(**step))
        by_id = np.argsort(output.top_ids, axis=-1)
        parts.append(np.take_along_axis(output.top_logprobs, by_id, axis=-1))
    return np.concatenate(parts)


@pytest.mark.parametrize("chunk", [64, 7, 1])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", tiny_llama_cases(), ids=lambda case: case.name)
def test_tiny_checkpoints_in_float32(
    case: TinyLlamaCase, isa: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAPSHEE_CPU_ISA", isa)
    weights = make_weights(case.config, case.seed)
    runner = make_runner(write_hf_folder(tmp_path, case.config, weights))
    logprobs = all_logprobs(runner, case.token_ids, chunk)
    runner.close()
    assert np.abs(logprobs - log_softmax(case.logits.astype(np.float64))).max() <= 1e-3


@pytest.mark.parametrize(
    "case",
    # A qwen3 file says nothing of windows.
    [case for case in tiny_llama_cases() if case.name != "qwen3_window"],
    ids=lambda case: case.name,
)
def test_tiny_gguf_files_in_float32(case: TinyLlamaCase, tmp_path: Path) -> None:
    weights = make_weights(case.config, case.seed)
    runner = make_runner(write_gguf_file(tmp_path / "tiny.gguf", case.config, weights))
    logprobs = all_logprobs(runner, case.token_ids, 7)
    runner.close()
    assert np.abs(logprobs - log_softmax(case.logits.astype(np.float64))).max() <= 1e-3


def teacher_forced(
    model: Path, goldens: tuple[GoldenText, ...], device: str = "cpu"
) -> tuple[list[float], list[bool]]:
    """|delta log-probability| at each position of the continuations, and whether the arg-max
    agrees at each that has a clear one."""
    errors, agreements = [], []
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    prompts = [{"prompt_token_ids": [*g.prompt_ids, *g.token_ids]} for g in goldens]
    with LLM(model=str(model), device=device) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for golden, output in zip(goldens, outputs, strict=True):
        assert output.prompt_logprobs is not None
        positions = output.prompt_logprobs[len(golden.prompt_ids) :]
        for i, (token_id, position) in enumerate(zip(golden.token_ids, positions, strict=True)):
            assert position is not None
            errors.append(abs(position[token_id].logprob - golden.logprobs[i]))
            if golden.margins[i] > CLEAR_MARGIN:
                (best,) = (t for t, entry in position.items() if entry.rank == 1)
                agreements.append(best == golden.argmax_ids[i])
    return errors, agreements


@pytest.mark.parametrize(("device", "isa"), FAST_KERNELS, ids=map("-".join, FAST_KERNELS))
def test_smollm2_teacher_forced(
    device: str, isa: str, default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa:
        monkeypatch.setenv("RAPSHEE_CPU_ISA", isa)
    errors, agreements = teacher_forced(default_model, smollm2_goldens(), device)
    assert len(errors) == 20 * 64
    assert len(agreements) > 1000
    assert np.mean(errors) <= MEAN_ERROR
    assert np.mean(agreements) >= 0.99


def test_smollm2_with_float_activations(
    default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAPSHEE_CPU_ACT", "f32")
    errors, agreements = teacher_forced(default_model, smollm2_goldens()[:5])
    assert np.mean(errors) <= 0.01
    assert all(agreements)
