"""Rows of packed tables, as the beginning of the residual stream."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.cuda_weights import PackedWeight, random_weight, unpack

LOW_BIT = ["q8", "q4z", "q4m", "q2m", "q3", "q5m", "q6"]
FORMATS = [("half", "bf16"), ("half", "f16"), *((format, "bf16") for format in LOW_BIT)]


def upload(weight: PackedWeight) -> object:
    on_device = cuda_ops.Weight(weight.format, weight.half, weight.rows, weight.cols)
    on_device.write(weight.codes, weight.scales)
    return on_device


def check(
    weight: PackedWeight, token_ids: npt.NDArray[np.int32], scale: float = 1.0
) -> npt.NDArray[np.float32]:
    x: npt.NDArray[np.float32] = cuda_ops.embed(upload(weight), token_ids, scale=scale)
    # An element is rounded once where a minimum is added, and once by the scale.
    expected = unpack(weight).astype(np.float32)[token_ids] * np.float32(scale)
    np.testing.assert_array_equal(x, expected)
    return x


def make(format: str, half: str, rows: int, cols: int) -> PackedWeight:
    return random_weight(np.random.default_rng(100 * rows + cols), format, half, rows, cols)


@pytest.mark.parametrize(("format", "half"), FORMATS)
@pytest.mark.parametrize("cols", [8, 24, 32, 40, 64, 72, 128, 136, 160])
def test_columns(cols: int, format: str, half: str) -> None:
    check(make(format, half, 11, cols), np.array([10, 0, 3, 3, 8], np.int32))


@pytest.mark.parametrize(("format", "half"), FORMATS)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17])
def test_every_row_of_a_table(rows: int, format: str, half: str) -> None:
    check(make(format, half, rows, 96), np.arange(rows, dtype=np.int32))


@pytest.mark.parametrize(
    ("format", "half", "cols"),
    [
        ("half", "bf16", 1056),
        ("q8", "bf16", 2112),
        ("q4z", "f16", 4224),
        ("q4m", "f16", 4096),
        ("q6", "bf16", 4224),
    ],
)
def test_rows_that_several_blocks_share_and_a_real_size(format: str, half: str, cols: int) -> None:
    check(make(format, half, 5, cols), np.array([4, 1], np.int32))


@pytest.mark.parametrize(("format", "half"), FORMATS)
def test_scale(format: str, half: str) -> None:
    check(make(format, half, 9, 64), np.array([8, 2], np.int32), scale=33.941125)


@pytest.mark.parametrize(("format", "half"), FORMATS)
def test_a_row_does_not_depend_on_the_others(format: str, half: str) -> None:
    weight = make(format, half, 20, 64)
    token_ids = np.array([19, 0, 7, 7], np.int32)
    x = check(weight, token_ids, scale=1.1)
    np.testing.assert_array_equal(check(weight, token_ids[2:3], scale=1.1), x[2:3])


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 8), (9, 40), (11, 1056)])
def test_plain_tables(rows: int, cols: int, half: str) -> None:
    packed = make("half", half, rows, cols)
    plain = cuda_ops.Weight("plain", half, rows, cols)
    values = unpack(packed).astype(np.float32)
    # A half's bits are the upper ones of its float, or numpy's.
    bits = values.view(np.uint32) >> np.uint32(16)
    halves = values.astype("<f2").view(np.uint16) if half == "f16" else bits.astype("<u2")
    rows_of_panels = np.zeros((-(-rows // 8) * 8, cols), np.uint16)
    rows_of_panels[:rows] = halves
    plain.write(rows_of_panels.view(np.uint8), np.zeros(0, np.uint8))
    token_ids = np.array([rows - 1, 0, rows // 2], np.int32)
    got = cuda_ops.embed(plain, token_ids, scale=1.5)
    np.testing.assert_array_equal(got, check(packed, token_ids, scale=1.5))


def test_no_rows() -> None:
    assert check(make("q8", "bf16", 3, 64), np.zeros(0, np.int32)).shape == (0, 64)


def test_repeats_are_timed() -> None:
    weight = upload(make("half", "bf16", 3, 32))
    token_ids = np.array([2], np.int32)
    x, times = cuda_ops.embed(weight, token_ids, repeats=2)
    assert times.shape == (2,)
    np.testing.assert_array_equal(x, cuda_ops.embed(weight, token_ids))


@pytest.mark.parametrize("token_id", [-1, 3])
def test_ids_beyond_the_table_are_refused(token_id: int) -> None:
    weight = upload(make("half", "bf16", 3, 32))
    with pytest.raises(ValueError, match=f"token_ids: got {token_id}, expected 0 to 2"):
        cuda_ops.embed(weight, np.array([token_id], np.int32))
