"""Sampling from logits, on one thread.

    python bench/kernels/bench_sampling.py [--json FILE]

A call also takes the maximum and the sum of exponentials of each row, which a step gets from the
output projection.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt

from harness import Report, add_options, measure
from rapshee_engine import _core
from roofline import Limits, sampling

VOCAB_SIZES = [49152, 128256]  # SmolLM2, Llama 3
COUNTS = [1, 32]
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k 40": {"top_k": 40},
    "top_p 0.95": {"top_p": 0.95},
    "20 logprobs": {"num_logprobs": 20},
}


def columns(rows: int, changes: dict[str, float]) -> dict[str, Any]:
    arrays: dict[str, npt.NDArray[Any]] = {
        "target_ids": np.full(rows, -1, np.int32),
        "temperature": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "repetition_penalty": np.ones(rows, np.float32),
        "presence_penalty": np.zeros(rows, np.float32),
        "frequency_penalty": np.zeros(rows, np.float32),
        "seed": np.arange(rows, dtype=np.uint64),
        "draw_index": np.zeros(rows, np.uint32),
        "num_logprobs": np.zeros(rows, np.int32),
        "state_slot": np.full(rows, -1, np.int32),
        "bias_indptr": np.zeros(rows + 1, np.int32),
        "bias_ids": np.zeros(0, np.int32),
        "bias_values": np.zeros(0, np.float32),
        "needs_mask": np.zeros(rows, np.uint8),
    }
    for name, value in changes.items():
        arrays[name].fill(value)
    return arrays


def verify(logits: npt.NDArray[np.float32], arrays: dict[str, Any], isa: str) -> None:
    """Log-probabilities of what is drawn are numpy's; greedy rows draw the largest."""
    tokens, logprobs, *_ = _core.sample(logits, isa=isa, **arrays)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected[np.arange(len(tokens)), tokens], atol=1e-4)
    greedy = arrays["temperature"] == 0
    np.testing.assert_array_equal(tokens[greedy], logits.argmax(axis=1)[greedy])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, threads=False)
    options = parser.parse_args()
    report = Report(Limits.measure(1, options.isa), options.json)
    for vocab in VOCAB_SIZES:
        for n in COUNTS:
            logits = np.random.default_rng(0).standard_normal((n, vocab), np.float32) * 3
            for name, changes in KINDS.items():
                arrays = columns(n, changes)
                verify(logits, arrays, options.isa)
                timing = measure(partial(_core.sample, logits, isa=options.isa, **arrays))
                report.add(f"sample {name} {n} x {vocab}", timing, sampling(n, vocab), cached=True)


if __name__ == "__main__":
    main()
