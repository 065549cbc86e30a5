"""The committed goldens are complete and consistent in themselves."""

from __future__ import annotations

import numpy as np
import pytest

from reference.golden import GoldenText, smollm2_goldens, tiny_llama_cases

GOLDENS = smollm2_goldens()


def test_counts() -> None:
    assert len(GOLDENS) == 20
    assert len({golden.prompt for golden in GOLDENS}) == 20
    assert len({case.name for case in tiny_llama_cases()}) == 16


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.prompt[:20])
def test_smollm2_golden(golden: GoldenText) -> None:
    assert len(golden.token_ids) == 64
    assert golden.prompt_logprobs.shape == (len(golden.prompt_ids) - 1,)
    assert golden.logprobs.shape == golden.margins.shape == golden.argmax_ids.shape == (64,)
    assert golden.top_ids.shape == golden.top_logprobs.shape == (64, 8)
    np.testing.assert_array_equal(golden.argmax_ids, golden.top_ids[:, 0])
    np.testing.assert_array_equal(golden.argmax_ids, golden.token_ids)
    np.testing.assert_array_equal(golden.logprobs, golden.top_logprobs[:, 0])
    gaps = golden.top_logprobs[:, 0] - golden.top_logprobs[:, 1]
    np.testing.assert_allclose(golden.margins, gaps, atol=1e-4)
    assert (np.diff(golden.top_logprobs) <= 0).all()
