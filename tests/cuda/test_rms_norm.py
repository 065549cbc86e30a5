"""The residual addition with RMSNorm: x += partial sums, perhaps normalised and scaled; out =
halves of the rows, perhaps normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.norm import rms_norm
from reference.quant import round_trip

# One rounding to halves; of floats the mean's (a few units, as its sum is a tree) and two products.
HALF_UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}  # of 8 and 11 bits
FLOAT_ERROR = 16 * 2.0**-24
SMALLEST = 2.0**-25  # half of the smallest f16

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    hidden: int = 128
    rows: int = 3
    splits: int = 2
    spare_rows: int = 0  # of the partial sums, which belong to no row
    half: str = "bf16"
    eps: float = 1e-5

    def inputs(self) -> dict[str, Any]:
        random = np.random.default_rng(self.hidden * 100 + self.rows)

        def values(*shape: int) -> Floats:
            return random.standard_normal(shape).astype(np.float32) * 3

        partials = values(self.splits, self.rows + self.spare_rows, self.hidden)
        return {
            "x": values(self.rows, self.hidden),
            "partials": partials if self.splits > 0 else None,
            "weight": values(self.hidden),
        }

    def run(self, **inputs: Any) -> tuple[Floats, Floats]:
        """Halves [rows, hidden], and x afterwards."""
        out, x = cuda_ops.add_rms_norm(**inputs, eps=self.eps, half=self.half)
        return out, x

    def sum(self, x: Floats, partials: Floats | None) -> Floats:
        """x and the partial sums in the order of the contract, rounded after each addition."""
        if partials is None:
            return x
        total = partials[0, : len(x)]
        for part in partials[1:, : len(x)]:
            total = total + part
        return x + total

    def check_norm(self, out: Floats, x: Floats, weight: Floats) -> None:
        expected = rms_norm(x, weight, self.eps)
        bound = (HALF_UNIT[self.half] + FLOAT_ERROR) * np.abs(expected) + SMALLEST
        excess = np.abs(out - expected) - bound
        assert (excess <= 0).all(), f"off by {excess.max()} more than allowed"

    def check(self) -> None:
        inputs = self.inputs()
        out, x = self.run(**inputs)
        np.testing.assert_array_equal(x, self.sum(inputs["x"], inputs["partials"]))
        self.check_norm(out, x, inputs["weight"])


@pytest.mark.parametrize(
    "hidden",
    [4, 8, 124, 128, 132, 576, 1024, 2044, 2048, 2052, 4096, 4100, 8192, 8196, 16384],
)
def test_sizes_of_rows(hidden: int) -> None:
    Case(hidden=hidden).check()


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_rows(rows: int, half: str) -> None:
    Case(rows=rows, half=half).check()


@pytest.mark.parametrize("hidden", [256, 2560, 5120, 9216])
@pytest.mark.parametrize("splits", [0, 1, 3, 8, 9])
def test_splits(splits: int, hidden: int) -> None:
    Case(hidden=hidden, rows=2, splits=splits).check()


def test_splits_lie_further_apart_than_their_rows() -> None:
    Case(spare_rows=5).check()


def check_sum_with_norm(case: Case, residual_scale: float) -> None:
    inputs = case.inputs()
    post_weight = np.random.default_rng(9).standard_normal(case.hidden).astype(np.float32)
    options = {"post_weight": post_weight, "residual_scale": residual_scale}
    out, x = case.run(**inputs, **options)
    y = case.sum(np.zeros_like(inputs["x"]), inputs["partials"])
    added = residual_scale * rms_norm(y, post_weight, case.eps)
    bound = FLOAT_ERROR * (np.abs(added) + np.abs(inputs["x"]))
    assert (np.abs(x - (inputs["x"] + added)) <= bound).all()
    case.check_norm(out, x, inputs["weight"])


@pytest.mark.parametrize("hidden", [4, 132, 640, 2052, 4100, 8196, 16384])
def test_a_sum_that_is_normalised_before_it_is_added(hidden: int) -> None:
    check_sum_with_norm(Case(hidden=hidden), residual_scale=1.0)


@pytest.mark.parametrize("splits", [1, 5, 9])
def test_a_normalised_sum_of_splits_that_is_scaled(splits: int) -> None:
    check_sum_with_norm(Case(hidden=256, splits=splits, eps=2.0), residual_scale=0.22)


def test_a_scaled_sum() -> None:
    case = Case()
    inputs = case.inputs()
    out, x = case.run(**inputs, residual_scale=0.22)
    y = case.sum(np.zeros_like(inputs["x"]), inputs["partials"])
    np.testing.assert_array_equal(x, inputs["x"] + np.float32(0.22) * y)
    case.check_norm(out, x, inputs["weight"])


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize(("hidden", "splits"), [(128, 0), (128, 2), (8196, 3)])
def test_rows_without_a_norm_are_rounded(hidden: int, splits: int, half: str) -> None:
    case = Case(hidden=hidden, splits=splits, half=half)
    inputs = case.inputs()
    out, x = case.run(**{**inputs, "weight": None})
    np.testing.assert_array_equal(x, case.sum(inputs["x"], inputs["partials"]))
    np.testing.assert_array_equal(out, round_trip(x, half))


def test_a_row_with_both_norms_does_not_depend_on_the_others() -> None:
    case = Case(hidden=2052, rows=3)
    inputs = case.inputs()
    post_weight = inputs["weight"][::-1].copy()
    out, x = case.run(**inputs, post_weight=post_weight)
    gathered, _ = case.run(**inputs, post_weight=post_weight, row_ids=np.array([2, 0], np.int32))
    np.testing.assert_array_equal(gathered, out[[2, 0]])
    alone_out, alone_x = case.run(
        x=inputs["x"][1:2],
        partials=np.ascontiguousarray(inputs["partials"][:, 1:2]),
        weight=inputs["weight"],
        post_weight=post_weight,
    )
    np.testing.assert_array_equal(alone_out[0], out[1])
    np.testing.assert_array_equal(alone_x[0], x[1])


def test_eps_is_added_to_the_mean_of_the_squares() -> None:
    Case(eps=5.0).check()


def test_a_row_of_zeros_stays_zero() -> None:
    case = Case(rows=2)
    out, _ = case.run(x=np.zeros((2, 128), np.float32), partials=None, weight=np.ones(128, "f4"))
    np.testing.assert_array_equal(out, 0.0)


def test_what_is_not_a_number_stays_in_its_row() -> None:
    case = Case()
    inputs = case.inputs()
    expected, _ = case.run(**inputs)
    inputs["partials"][1, 1, 5] = np.nan
    out, _ = case.run(**inputs)
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(out[[0, 2]], expected[[0, 2]])


def test_partial_sums_are_added_in_order_and_then_to_x() -> None:
    case = Case(splits=3)
    inputs = case.inputs()
    # In this order the first is lost: 1 + 2^24 is 2^24.
    for split, value in zip(inputs["partials"], (1.0, 2.0**24, -(2.0**24)), strict=True):
        split[:] = value
    _, x = case.run(**inputs)
    np.testing.assert_array_equal(x, inputs["x"])


@pytest.mark.parametrize("hidden", [256, 2560])
def test_splits_that_were_merged_before_give_the_same_bits(hidden: int) -> None:
    case = Case(hidden=hidden, splits=4)
    inputs = case.inputs()
    out, x = case.run(**inputs)
    merged = inputs["partials"][0]
    for part in inputs["partials"][1:]:
        merged = merged + part
    merged_out, merged_x = case.run(**{**inputs, "partials": merged[None]})
    np.testing.assert_array_equal(merged_out, out)
    np.testing.assert_array_equal(merged_x, x)


@pytest.mark.parametrize("hidden", [132, 3072, 5120])
def test_a_row_does_not_depend_on_the_others(hidden: int) -> None:
    case = Case(hidden=hidden, rows=5)
    inputs = case.inputs()
    out, x = case.run(**inputs)
    for row in range(5):
        alone = {
            "x": inputs["x"][row : row + 1],
            "partials": np.ascontiguousarray(inputs["partials"][:, row : row + 1]),
            "weight": inputs["weight"],
        }
        alone_out, alone_x = case.run(**alone)
        np.testing.assert_array_equal(alone_out[0], out[row])
        np.testing.assert_array_equal(alone_x[0], x[row])


@pytest.mark.parametrize("splits", [0, 3])
def test_gathered_rows_leave_x_alone(splits: int) -> None:
    case = Case(rows=6, splits=splits, spare_rows=1)
    inputs = case.inputs()
    everything, _ = case.run(**inputs)
    row_ids = np.array([5, 0, 0, 3], np.int32)
    out, x = case.run(**inputs, row_ids=row_ids)
    np.testing.assert_array_equal(out, everything[row_ids])
    np.testing.assert_array_equal(x, inputs["x"])


def test_no_rows() -> None:
    case = Case(rows=0)
    out, x = case.run(**case.inputs())
    assert out.shape == x.shape == (0, 128)
    case = Case()
    out, _ = case.run(**case.inputs(), row_ids=np.zeros(0, np.int32))
    assert out.shape == (0, 128)


def test_repeats_are_timed() -> None:
    case = Case()
    inputs = case.inputs()
    out, x = case.run(**inputs)
    timed_out, timed_x, times = cuda_ops.add_rms_norm(**inputs, eps=case.eps, repeats=2)
    assert times.shape == (2,)
    np.testing.assert_array_equal(timed_out, out)
    np.testing.assert_array_equal(timed_x, x)


@pytest.mark.parametrize("hidden", [0, 6, 16388])
def test_sizes_that_the_kernel_does_not_take_are_refused(hidden: int) -> None:
    case = Case(hidden=hidden, splits=0)
    with pytest.raises(ValueError, match=f"hidden: got {hidden}, expected a multiple of 4"):
        case.run(**case.inputs())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((3, 128))}, "x: got dtype float64"),
        ({"weight": np.zeros(127, np.float32)}, "weight: got 127, expected 128"),
        ({"post_weight": np.zeros(127, np.float32)}, "post_weight: got 127, expected 128"),
        ({"partials": np.zeros((2, 2, 128), np.float32)}, "partials: got"),
        ({"partials": np.zeros((0, 3, 128), np.float32)}, "partials: got"),
        ({"row_ids": np.array([3], np.int32)}, "row_ids: got 3, expected 0 to 2"),
        ({"half": "f32"}, "half: got 'f32', expected bf16 or f16"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    case = Case()
    with pytest.raises(ValueError, match=message):
        cuda_ops.add_rms_norm(**{**case.inputs(), "eps": case.eps, **changes})
