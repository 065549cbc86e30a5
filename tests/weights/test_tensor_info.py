from __future__ import annotations

import pytest

from rapshee_engine.errors import WeightFileError
from rapshee_engine.weights.tensor_info import TensorInfo, check_no_overlap, tensor_nbytes


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("f32", (3,), 12),
        ("f16", (3, 5), 30),
        ("bf16", (2, 3, 5, 7), 420),
        ("q4_0", (2, 64), 4 * 18),
        ("q4_1", (2, 64), 4 * 20),
        ("q5_0", (2, 64), 4 * 22),
        ("q5_1", (2, 64), 4 * 24),
        ("q8_0", (2, 64), 4 * 34),
        ("q2_k", (2, 512), 4 * 84),
        ("q3_k", (2, 512), 4 * 110),
        ("q4_k", (2, 512), 4 * 144),
        ("q5_k", (2, 512), 4 * 176),
        ("q6_k", (2, 512), 4 * 210),
    ],
)
def test_nbytes(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    assert tensor_nbytes(dtype, shape) == nbytes


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        ("f32", (), "1 to 4 dimensions, got 0"),
        ("f32", (1, 1, 1, 1, 1), "1 to 4 dimensions, got 5"),
        ("f32", (3, 0), "positive"),
        ("f32", (-3, -2), "positive"),
        ("f32", (1 << 32, 1 << 31), "more than 2\\^63"),
        ("q4_0", (64, 31), "multiple of 32"),
        ("q4_k", (64, 128), "multiple of 256"),
    ],
)
def test_impossible_shapes(dtype: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tensor_nbytes(dtype, shape)


def test_overlap_names_both_tensors() -> None:
    first = TensorInfo("first", "f32", (4,), 100, 16)
    second = TensorInfo("second", "f32", (4,), 115, 16)
    with pytest.raises(WeightFileError, match=r"'second'.*overlap.*'first'"):
        check_no_overlap("file", [second, first])


def test_neighbours_do_not_overlap() -> None:
    first = TensorInfo("first", "f32", (4,), 100, 16)
    second = TensorInfo("second", "f32", (4,), 116, 16)
    check_no_overlap("file", [second, first])
