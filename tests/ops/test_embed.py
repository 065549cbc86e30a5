"""Rows of a packed matrix, as the embedding gathers them."""

from __future__ import annotations

import numpy as np
import pytest

from rapshee_engine import _core
from reference.quant import DTYPES, LOW_BIT, block_length, decode, encode, round_trip


def pack(data: bytes, dtype: str, rows: int, cols: int, compute: str) -> _core.PackedMatrix:
    return _core.PackedMatrix(np.frombuffer(data, np.uint8), dtype, rows, cols, compute=compute)


@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (15, 64), (16, 96), (17, 128), (49, 576)])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_matrix(dtype: str, compute: str, rows: int, cols: int) -> None:
    cols = -(-cols // block_length(dtype)) * block_length(dtype)
    values = np.random.default_rng(rows).standard_normal((rows, cols))
    data = encode(values, dtype)
    expected = decode(data, dtype, (rows, cols))
    if compute == "bfloat16" and dtype not in LOW_BIT:
        expected = round_trip(expected, "bf16")
    matrix = pack(data, dtype, rows, cols, compute)
    for i in range(rows):
        np.testing.assert_array_equal(matrix.row(i), expected[i])


@pytest.mark.parametrize("cols", [1, 2, 15, 17, 33])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_odd_widths(dtype: str, cols: int) -> None:
    data = encode(np.random.default_rng(cols).standard_normal((18, cols)), dtype)
    matrix = pack(data, dtype, 18, cols, "auto")
    actual = np.stack([matrix.row(i) for i in range(18)])
    np.testing.assert_array_equal(actual, decode(data, dtype, (18, cols)))


@pytest.mark.parametrize(
    ("dtype", "bytes_per_32"),
    [
        ("f32", 128),
        ("bf16", 64),
        ("q4_0", 18),
        ("q4_1", 20),
        ("q5_0", 22),
        ("q5_1", 24),
        ("q8_0", 34),
    ],
)
def test_panels_are_no_larger_than_the_file(dtype: str, bytes_per_32: int) -> None:
    data = encode(np.zeros((32, 256)), dtype)
    assert len(data) == 32 * 8 * bytes_per_32
    assert pack(data, dtype, 32, 256, "auto").nbytes == len(data)


@pytest.mark.parametrize(
    ("dtype", "bytes_per_32"),
    [("q2_k", 12.5), ("q3_k", 14.25), ("q4_k", 18.5), ("q5_k", 22.5), ("q6_k", 26.25)],
)
def test_panels_keep_each_scale_in_a_byte(dtype: str, bytes_per_32: float) -> None:
    data = encode(np.zeros((32, 1024)), dtype)
    assert pack(data, dtype, 32, 1024, "auto").nbytes == 32 * 32 * bytes_per_32


def test_wrong_arguments_are_refused() -> None:
    data = np.zeros(68, np.uint8)
    with pytest.raises(ValueError, match="data: got 68 bytes, expected 34"):
        _core.PackedMatrix(data, "q8_0", 1, 32)
    with pytest.raises(ValueError, match="shape"):
        _core.PackedMatrix(data, "q8_0", 0, 32)
    with pytest.raises(ValueError, match="dtype"):
        _core.PackedMatrix(data, "q9_0", 1, 32)
    with pytest.raises(ValueError, match="data: got dtype int8"):
        _core.PackedMatrix(data.view(np.int8), "q8_0", 2, 32)
    matrix = _core.PackedMatrix(data, "q8_0", 2, 32)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"row: got {index}"):
            matrix.row(index)
