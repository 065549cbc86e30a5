"""Logits that a family scales or caps: softcap * tanh(scale * logit / softcap)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops

Floats = npt.NDArray[np.float32]


def logits(rows: int, vocab: int) -> Floats:
    random = np.random.default_rng(1000 * rows + vocab)
    return (20 * random.standard_normal((rows, vocab))).astype(np.float32)


@pytest.mark.parametrize("vocab", [1, 3, 4, 301, 1024, 1027])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_scaled_logits(rows: int, vocab: int) -> None:
    x = logits(rows, vocab)
    np.testing.assert_array_equal(
        cuda_ops.scale_logits(x, scale=0.0625 * 1.1), x * np.float32(0.0625 * 1.1)
    )


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 30.0), (0.125, 2.0), (3.0, 50.0)])
def test_capped_logits(scale: float, softcap: float) -> None:
    x = logits(3, 301)
    expected = softcap * np.tanh(x.astype(np.float64) * scale / softcap)
    got = cuda_ops.scale_logits(x, scale=scale, softcap=softcap)
    # Two roundings of the argument, whose derivative is 1 at most; tanh within 2 units; a product.
    np.testing.assert_allclose(got, expected, rtol=8 * 2.0**-24)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_what_is_not_finite_stays_so_and_in_its_place(softcap: float) -> None:
    x = logits(2, 9)
    expected = cuda_ops.scale_logits(x, scale=0.5, softcap=softcap)
    for place, value in (((0, 3), np.nan), ((1, 0), np.inf), ((1, 8), -np.inf)):
        x[place] = expected[place] = value
    got = cuda_ops.scale_logits(x, scale=0.5, softcap=softcap)
    np.testing.assert_array_equal(got, expected)


def test_repeats_are_timed() -> None:
    x = logits(1, 8)
    got, times = cuda_ops.scale_logits(x, softcap=30.0, repeats=2)
    assert times.shape == (2,)
    np.testing.assert_array_equal(got, cuda_ops.scale_logits(x, softcap=30.0))


@pytest.mark.parametrize(("scale", "softcap"), [(0.0, 30.0), (1.0, -1.0)])
def test_factors_out_of_range_are_refused(scale: float, softcap: float) -> None:
    with pytest.raises(ValueError, match=f"scale: got {scale:g}, softcap: {softcap:g}"):
        cuda_ops.scale_logits(logits(1, 4), scale=scale, softcap=softcap)
