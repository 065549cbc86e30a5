from __future__ import annotations

import numpy as np
import pytest

from rapshee_engine.models.rope import (
    dynamic_inv_freq,
    linear_inv_freq,
    llama3_inv_freq,
    longrope_attention_factor,
    plain_inv_freq,
    with_factors,
    yarn_attention_factor,
    yarn_inv_freq,
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


def test_dynamic_keeps_all_up_to_the_trained_length() -> None:
    plain = plain_inv_freq(10_000.0, 16)
    for length in (1, 99, 100):
        scaled = dynamic_inv_freq(10_000.0, 16, factor=4.0, length=length, trained_length=100)
        np.testing.assert_array_equal(scaled, plain)


def test_dynamic_stretches_the_slowest_by_what_is_beyond() -> None:
    plain = plain_inv_freq(10_000.0, 16)
    scaled = dynamic_inv_freq(10_000.0, 16, factor=4.0, length=300, trained_length=100)
    assert scaled[0] == plain[0]
    assert (np.diff(plain / scaled) > 0).all()
    # The base grows so that the last frequency falls by factor * (length / trained - 1) + 1.
    np.testing.assert_allclose(plain[-1] / scaled[-1], 4 * 2 + 1, rtol=1e-6)


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones() -> None:
    theta, dim, original = 10_000.0, 64, 2048
    plain = plain_inv_freq(theta, dim)
    scaled = yarn_inv_freq(theta, dim, factor=8.0, original_length=original)
    assert scaled.dtype == np.float32
    turns = original * plain / (2 * np.pi)
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[turns > 32 * 1.4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1 / 1.4], 8.0, rtol=1e-6)
    between = ratio[(turns < 32) & (turns > 1)]
    assert ((between > 1) & (between < 8)).all()
    assert (np.diff(ratio) >= 0).all()


def test_yarn_bounds() -> None:
    def frequencies(**options: float) -> list[float]:
        inv_freq = yarn_inv_freq(10_000.0, 16, factor=4.0, original_length=512, **options)
        return inv_freq.tolist()

    default = frequencies()
    assert default == frequencies(beta_fast=32.0, beta_slow=1.0)
    assert default != frequencies(truncate=False)
    assert default != frequencies(beta_fast=8.0)
    # Bounds that meet are a step, not a division by zero.
    assert np.isfinite(frequencies(beta_fast=1e-9, beta_slow=1e-9, truncate=False)).all()


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(1.0) == yarn_attention_factor(0.5) == 1.0
    assert yarn_attention_factor(4.0) == pytest.approx(1.1386294)
    # One of the two alone counts for nothing.
    assert yarn_attention_factor(4.0, mscale=2.0) == yarn_attention_factor(4.0)
    both = yarn_attention_factor(4.0, mscale=2.0, mscale_all_dim=1.0)
    assert both == pytest.approx(1.2772589 / 1.1386294)


def test_longrope_attention_factor() -> None:
    assert longrope_attention_factor(1.0, 4096) == 1.0
    # Phi-3's 4k models, extended to 128k.
    assert longrope_attention_factor(32.0, 4096) == pytest.approx(1.1902381)
