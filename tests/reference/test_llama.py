"""The oracle itself is right: it agrees with transformers."""

from __future__ import annotations

import numpy as np
import pytest

from reference.golden import TinyLlamaCase, tiny_llama_cases
from reference.llama import forward
from reference.tiny_llama import make_weights


@pytest.mark.parametrize("case", tiny_llama_cases(), ids=lambda case: case.name)
def test_forward_agrees_with_transformers(case: TinyLlamaCase) -> None:
    logits = forward(make_weights(case.config, case.seed), case.config, case.token_ids)
    np.testing.assert_allclose(logits, case.logits, rtol=0, atol=5e-5)


def test_window_hides_older_tokens() -> None:
    case = next(case for case in tiny_llama_cases() if case.name == "mistral_window")
    weights = make_weights(case.config, case.seed)
    full = forward(weights, {**case.config, "sliding_window": None}, case.token_ids)
    window = case.config["sliding_window"]
    np.testing.assert_allclose(full[:window], case.logits[:window], rtol=0, atol=5e-5)
    assert np.abs(full[window:] - case.logits[window:]).max() > 0.1
