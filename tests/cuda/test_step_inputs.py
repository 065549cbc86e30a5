"""What a step's layers share: resolved tokens, cosines and sines."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops

Floats = npt.NDArray[np.float32]

# The reduced angle's rounding to float, an ulp of sine and cosine, and the factor's product.
ERROR = 2e-7


def inverse_frequencies(half_dim: int, base: float = 500000.0) -> Floats:
    return (base ** (-np.arange(half_dim) / max(half_dim, 1))).astype(np.float32)


def check(positions: npt.ArrayLike, inv_freq: Floats, factor: float = 1.0) -> None:
    positions = np.asarray(positions, np.int32)
    cos, sin = cuda_ops.rope_table(positions, inv_freq, attention_factor=factor)
    angle = positions.astype(np.float32)[:, None] * inv_freq
    assert angle.dtype == np.float32
    for got, expected in (
        (cos, np.cos(angle.astype(np.float64))),
        (sin, np.sin(angle, dtype="f8")),
    ):
        assert got.shape == angle.shape
        np.testing.assert_allclose(got, factor * expected, rtol=0, atol=ERROR * factor)


def test_positions_up_to_the_longest_contexts() -> None:
    random = np.random.default_rng(1)
    edges = [0, 1, 2, 3, 4095, 4096, 131071, 131072, 2**20, 10_000_000, 2**24 + 1]
    check([*edges, *random.integers(0, 131073, 100)], inverse_frequencies(64))


def test_angles_around_every_quarter_turn() -> None:
    quarters = np.arange(1, 65) * (np.pi / 2)
    near = np.nextafter(quarters.astype(np.float32), np.float32(0))
    check([1], np.concatenate([near, quarters.astype(np.float32), -near]))


@pytest.mark.parametrize("half_dim", [1, 3, 16, 48, 128])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_shapes(rows: int, half_dim: int) -> None:
    check(np.arange(rows) * 1000 + 7, inverse_frequencies(half_dim))


def test_attention_factor_multiplies_both() -> None:
    check([0, 5, 100000], inverse_frequencies(8), factor=1.3465735)


def test_an_angle_does_not_depend_on_the_other_rows() -> None:
    positions = np.array([3, 131072, 77, 77, 5000], np.int32)
    inv_freq = inverse_frequencies(40)
    tables = cuda_ops.rope_table(positions, inv_freq)
    for row in range(len(positions)):
        for table, alone in zip(
            tables, cuda_ops.rope_table(positions[row : row + 1], inv_freq), strict=True
        ):
            np.testing.assert_array_equal(alone[0], table[row])


@pytest.mark.parametrize(("rows", "half_dim"), [(0, 8), (3, 0)])
def test_no_angles(rows: int, half_dim: int) -> None:
    check(np.arange(rows), inverse_frequencies(half_dim))


def resolve(token_ids: list[int], samples: list[int]) -> list[int]:
    resolved = cuda_ops.resolve_tokens(np.array(token_ids, np.int32), np.array(samples, np.int32))
    return [int(token) for token in resolved]


def test_negative_ids_become_samples() -> None:
    assert resolve([7, -1, 0, -3, -1, 2**31 - 1], [40, 41, 42]) == [7, 40, 0, 42, 40, 2**31 - 1]


def test_a_sample_that_failed_becomes_token_0() -> None:
    assert resolve([-2, -1], [9, -1]) == [0, 9]


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 300])
def test_rows_of_tokens(rows: int) -> None:
    samples = list(range(1000, 1000 + rows))
    assert resolve([~i for i in reversed(range(rows))], samples) == samples[::-1]
    assert resolve(samples, []) == samples


def test_samples_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="token_ids: got -3, expected -2 or above"):
        resolve([-3], [5, 6])
