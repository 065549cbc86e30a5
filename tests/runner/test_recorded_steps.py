"""Decode steps give the same bits whether a device runs their operations one by one, records them,
or replays a recording: among longer sequences, which are not recorded, and alone, over and over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rapshee_engine import _core
from reference.devices import native_dtype
from reference.steps import Chunk, StepArrays, make_runner, make_step
from reference.tiny_llama import make_config, make_weights, write_gguf_file

VOCAB = 67
PROMPTS = [5, 17, 30]  # three rows, which CUDA pads to four
STEPS = 7
# Wider than any list that is recorded: such a step grows memory that recordings know.
WIDE_STEP, WIDE = 4, 40

Columns = dict[str, Any]

OPTIONS: dict[str, Columns] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "num_logprobs": 3},
    "min_p": {"temperature": 1.5, "min_p": 0.05},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "num_logprobs": 1,
    },
    "masked": {"temperature": 1.0, "needs_mask": 1, "num_logprobs": 2},
}


@pytest.fixture
def checkpoint(tmp_path: Path, device: str) -> Path:
    config = make_config(vocab_size=VOCAB, num_hidden_layers=2)
    weights = make_weights(config, seed=1)
    return write_gguf_file(tmp_path / "tiny.gguf", config, weights, dtype=native_dtype(device))


def blocks_of(row: int) -> list[int]:
    return list(range(4 * row, 4 * row + 4))


def prefill(runner: _core.ModelRunner) -> None:
    chunks = [
        Chunk([7 * i % VOCAB for i in range(n)], 0, blocks_of(r)) for r, n in enumerate(PROMPTS)
    ]
    runner.collect(runner.launch(**make_step(chunks)))


def decode_step(step: int, options: Columns, companion: bool) -> StepArrays:
    """Each sequence continues the sample of the step before; the first begins with its number.

    ``companion``: a sequence of two tokens comes behind them.
    """
    tokens = [r + 1 if step == 0 else ~r for r in range(len(PROMPTS))]
    chunks = [
        Chunk([t], n + step, blocks_of(r))
        for r, (t, n) in enumerate(zip(tokens, PROMPTS, strict=True))
    ]
    if companion:
        chunks.append(Chunk([3, 4], 2 * step, blocks_of(len(PROMPTS))))
    arrays = make_step(chunks)
    rows, own = len(chunks), len(PROMPTS)
    for name, value in options.items():
        arrays[name][:own] = value
    arrays["seed"][:own] = np.arange(own) + 100
    arrays["draw_index"][:own] = step
    if step == WIDE_STEP:
        arrays["num_logprobs"][:own] = WIDE
    if "repetition_penalty" in options:
        arrays["state_slot"][:own] = np.arange(own)
        # The bias of the first row alone, by one more token each step.
        arrays["bias_indptr"] = np.minimum(np.arange(rows + 1), 1).astype(np.int32) * (step + 1)
        arrays["bias_ids"] = np.arange(step + 1, dtype=np.int32)
        arrays["bias_values"] = np.full(step + 1, -2.0, np.float32)
    return arrays


def masks_of(step: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.random.default_rng(step).integers(1, 1 << 32, (len(PROMPTS), 3), dtype=np.uint32)


def decode(runner: _core.ModelRunner, options: Columns, companion: bool) -> list[Sequence[Any]]:
    """What `STEPS` steps gave the sequences, each launched before the last was collected."""
    prefill(runner)
    if "repetition_penalty" in options:
        for row in range(len(PROMPTS)):
            runner.set_state(row, np.array([1, 2, 2, 5 + row], np.int32), 2)
    results, waiting = [], []
    for step in range(STEPS + 1):
        if step < STEPS:
            waiting.append(runner.launch(**decode_step(step, options, companion)))
            if "needs_mask" in options:
                runner.set_masks(waiting[-1], masks_of(step))
        if len(waiting) == 2 or step == STEPS:
            out = runner.collect(waiting.pop(0))
            own, width = (
                len(PROMPTS),
                WIDE if len(results) == WIDE_STEP else options.get("num_logprobs", 0),
            )
            results.append(
                (
                    out.token_ids[:own],
                    out.logprobs[:own],
                    out.ranks[:own],
                    out.top_ids[:own, :width],
                    out.top_logprobs[:own, :width],
                )
            )
    return results


@pytest.mark.parametrize("name", OPTIONS)
def test_recorded_steps_equal_others(checkpoint: Path, device: str, name: str) -> None:
    options = OPTIONS[name]
    runner = make_runner(checkpoint, device=device, max_num_tokens=64, max_num_seqs=8)
    expected = decode(runner, options, companion=True)
    assert len({tuple(tokens) for tokens, *_ in expected}) > 1
    for _ in range(2):  # the second time begins with what the first has recorded
        for step, (got, wanted) in enumerate(
            zip(decode(runner, options, False), expected, strict=True)
        ):
            for one, other in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"step {step}")
    runner.close()


def test_results_do_not_depend_on_what_was_recorded_before(checkpoint: Path, device: str) -> None:
    runner = make_runner(checkpoint, device=device, max_num_tokens=64, max_num_seqs=8)
    first = {name: decode(runner, options, False) for name, options in OPTIONS.items()}
    for name in reversed(OPTIONS):
        for got, wanted in zip(decode(runner, OPTIONS[name], False), first[name], strict=True):
            for one, other in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=name)
    runner.close()
