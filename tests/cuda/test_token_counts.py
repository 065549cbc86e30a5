"""The kernel that counts the tokens of a request for the penalties."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops

IN_PROMPT = 1 << 31


def expected(
    tokens: npt.NDArray[np.int32], num_prompt_tokens: int, vocab: int
) -> npt.NDArray[np.uint32]:
    counts = np.bincount(tokens[num_prompt_tokens:], minlength=vocab).astype(np.uint32)
    counts[tokens[:num_prompt_tokens]] |= np.uint32(IN_PROMPT)
    return counts


@pytest.mark.parametrize("vocab", [1, 31, 2047, 2048, 2049, 32000])
@pytest.mark.parametrize("count", [0, 1, 255, 257, 3000])
def test_counts(vocab: int, count: int) -> None:
    tokens = np.random.default_rng(vocab + count).integers(0, vocab, count, dtype=np.int32)
    for num_prompt_tokens in sorted({0, count // 3, count}):
        counts = cuda_ops.set_token_counts(tokens, num_prompt_tokens=num_prompt_tokens, vocab=vocab)
        np.testing.assert_array_equal(counts, expected(tokens, num_prompt_tokens, vocab))


def test_a_token_of_prompt_and_output_is_both() -> None:
    tokens = np.array([2, 0, 2, 2, 1], dtype=np.int32)
    counts = cuda_ops.set_token_counts(tokens, num_prompt_tokens=2, vocab=4)
    np.testing.assert_array_equal(counts, [IN_PROMPT, 1, IN_PROMPT + 2, 0])


def test_one_token_many_times() -> None:
    counts = cuda_ops.set_token_counts(np.full(5000, 3, np.int32), num_prompt_tokens=7, vocab=9)
    np.testing.assert_array_equal(counts, [0, 0, 0, IN_PROMPT + 4993, 0, 0, 0, 0, 0])


def test_no_vocabulary() -> None:
    assert cuda_ops.set_token_counts(np.zeros(0, np.int32), num_prompt_tokens=0, vocab=0).size == 0


@pytest.mark.parametrize("num_prompt_tokens", [-1, 4])
def test_wrong_prompt_lengths_are_refused(num_prompt_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"num_prompt_tokens: got {num_prompt_tokens}"):
        cuda_ops.set_token_counts(
            np.zeros(3, np.int32), num_prompt_tokens=num_prompt_tokens, vocab=5
        )


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens\[1\]: got 5, expected 0 to 4"):
        cuda_ops.set_token_counts(np.array([0, 5], np.int32), num_prompt_tokens=0, vocab=5)
