from __future__ import annotations

import numpy as np
import pytest

from rapshee_engine.models.rope import (
    linear_inv_freq,
    llama3_inv_freq,
    plain_inv_freq,
    with_factors,
)


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0])
@pytest.mark.parametrize("rotated_dim", [2, 20, 64, 128])
def test_plain_frequencies(theta: float, rotated_dim: int) -> None:
    frequencies = plain_inv_freq(theta, rotated_dim)
    assert frequencies.dtype == np.float32
    exact = theta ** (-np.arange(0, rotated_dim, 2) / rotated_dim)
    # Exponents are rounded to float32 as transformers rounds them; up to 13.1 * 2^-25 of error.
    np.testing.assert_allclose(frequencies, exact, rtol=6e-7)


def test_linear_divides_all() -> None:
    plain = plain_inv_freq(10_000.0, 8)
    scaled = linear_inv_freq(plain, 4.0)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled * 4, plain)


def test_llama3_keeps_short_stretches_long_and_blends_between() -> None:
    # Wavelengths in units of the original context: 1/8 (short), 1/2 (between), 2 (long).
    context = 1000
    plain = np.float32(2 * np.pi / (np.array([1 / 8, 1 / 2, 2]) * context))
    scaled = llama3_inv_freq(
        plain, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=context
    )
    assert scaled.dtype == np.float32
    kept = (2 - 1) / (4 - 1)
    expected = plain * np.float32([1, kept + (1 - kept) / 8, 1 / 8])
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_factors_divide_one_by_one() -> None:
    plain = plain_inv_freq(10_000.0, 4)
    scaled = with_factors(plain, [1.0, 8.0])
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, plain / np.float32([1, 8]))
