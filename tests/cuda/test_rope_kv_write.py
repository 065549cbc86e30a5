"""The kernel between the QKV projection and attention: sums splits, normalises heads or rows,
rotates, and writes queries and the cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.quant import round_trip
from reference.rope import rotate

# One rounding to halves, and some of floats before it: of 2^-24 each, a few of the sum of splits
# and the mean, two of a rotation, relative to the larger of a pair.
HALF_UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}  # of 8 and 11 bits
FLOAT_ERROR = 16 * 2.0**-24

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    heads: int = 3
    kv_heads: int = 2
    head_dim: int = 16
    half_dim: int = 8
    splits: int = 1
    rows: int = 5
    block_size: int = 16
    half: str = "bf16"
    norm: bool = False
    row_norm: bool = False
    eps: float = 1e-5

    def inputs(self) -> dict[str, npt.NDArray[np.generic]]:
        random = np.random.default_rng(self.head_dim * 100 + self.rows)
        heads = self.heads + 2 * self.kv_heads

        def values(*shape: int) -> Floats:
            return random.standard_normal(shape).astype(np.float32) * 3

        angles = values(self.rows, self.half_dim) * 100
        return {
            "qkv": values(self.splits, self.rows, heads * self.head_dim),
            "slots": random.permutation(4 * self.block_size)[: self.rows].astype(np.int64),
            "cos": np.cos(angles),
            "sin": np.sin(angles),
            "q_norm": values(self.head_dim * (self.heads if self.row_norm else 1)),
            "k_norm": values(self.head_dim * (self.kv_heads if self.row_norm else 1)),
        }

    def run(self, **inputs: npt.NDArray[np.generic]) -> tuple[Floats, Floats, Floats]:
        """Queries [rows, heads, head_dim]; keys and values of the cache by slot."""
        norms = {name: inputs.pop(name) for name in ("q_norm", "k_norm")}
        cache = cuda_ops.PagedCache(4, self.block_size, self.kv_heads, self.head_dim, self.half)
        options = {**norms, "row_norm": self.row_norm} if self.norm or self.row_norm else {}
        q = cache.write(**inputs, **options, eps=self.eps)
        k, v = (a.swapaxes(1, 2).reshape(-1, self.kv_heads, self.head_dim) for a in cache.read())
        return q, k, v

    def expected(self, **inputs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.float64]]:
        """Queries, keys and values [rows, heads, head_dim] before they are rounded."""
        total = inputs["qkv"].astype(np.float64).sum(axis=0)
        total = total.reshape(self.rows, -1, self.head_dim)
        q, k, v = np.split(total, [self.heads, self.heads + self.kv_heads], axis=1)
        if self.norm or self.row_norm:
            over = (1, 2) if self.row_norm else 2
            q, k = (
                x
                / np.sqrt((x**2).mean(axis=over, keepdims=True) + self.eps)
                * inputs[weight].reshape(-1, self.head_dim)
                for x, weight in ((q, "q_norm"), (k, "k_norm"))
            )
        for heads in (q, k):
            for row, cos, sin in zip(heads, inputs["cos"], inputs["sin"], strict=True):
                row[:] = rotate(row, cos, sin)
        return [q, k, v]

    def check(self) -> None:
        inputs = self.inputs()
        q, k, v = self.run(**inputs)
        slots = inputs["slots"]
        for got, expected in zip((q, k[slots], v[slots]), self.expected(**inputs), strict=True):
            floats = FLOAT_ERROR * self.splits * (1 + np.abs(expected).max(axis=2, keepdims=True))
            excess = np.abs(got - expected) - HALF_UNIT[self.half] * np.abs(expected) - floats
            assert (excess <= 0).all(), f"off by {excess.max()} more than allowed"
        untouched = np.setdiff1d(np.arange(len(k)), slots)
        assert np.isnan(k[untouched]).all()
        assert np.isnan(v[untouched]).all()


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "half_dim"),
    [(8, 4), (8, 0), (8, 3), (64, 32), (72, 20), (80, 40), (128, 64), (136, 68), (256, 128)],
)
def test_head_sizes_and_rotated_parts(head_dim: int, half_dim: int, norm: bool, half: str) -> None:
    Case(head_dim=head_dim, half_dim=half_dim, norm=norm, half=half).check()


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 33])
def test_rows(rows: int) -> None:
    Case(rows=rows, norm=True).check()


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits(splits: int) -> None:
    Case(splits=splits, norm=True).check()


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 4), (20, 2)])
def test_norms_of_whole_rows(heads: int, kv_heads: int, half: str) -> None:
    Case(heads=heads, kv_heads=kv_heads, head_dim=72, half_dim=36, half=half, row_norm=True).check()
    Case(heads=heads, kv_heads=kv_heads, splits=3, eps=5.0, half=half, row_norm=True).check()


def test_splits_are_summed_in_order() -> None:
    case = Case(splits=3, half_dim=0)
    inputs = case.inputs()
    # In this order the first is lost: 1 + 2^24 is 2^24.
    for split, value in zip(inputs["qkv"], (1.0, 2.0**24, -(2.0**24)), strict=True):
        split[:] = value
    q, k, v = case.run(**inputs)
    for got in (q, k[inputs["slots"]], v[inputs["slots"]]):
        np.testing.assert_array_equal(got, 0.0)


def test_eps_is_added_to_the_mean_of_the_squares() -> None:
    Case(norm=True, eps=5.0).check()


def test_block_sizes_and_a_real_shape() -> None:
    Case(
        heads=32, kv_heads=8, head_dim=128, half_dim=64, block_size=64, splits=2, norm=True
    ).check()


def test_only_queries_or_no_rows_or_no_queries() -> None:
    case = Case(rows=0)
    q, k, _ = case.run(**case.inputs())
    assert q.shape == (0, 3, 16)
    assert np.isnan(k).all()
    Case(heads=0).check()


def test_a_row_without_a_slot_has_queries_alone() -> None:
    case = Case(norm=True)
    inputs = case.inputs()
    q, k, v = case.run(**inputs)
    lost = int(inputs["slots"][2])
    inputs["slots"][2] = -1
    padded_q, padded_k, padded_v = case.run(**inputs)
    np.testing.assert_array_equal(padded_q, q)
    for some, other in ((padded_k, k), (padded_v, v)):
        assert np.isnan(some[lost]).all()
        np.testing.assert_array_equal(np.delete(some, lost, axis=0), np.delete(other, lost, axis=0))


@pytest.mark.parametrize("row_norm", [False, True])
def test_a_row_has_the_same_bits_alone(row_norm: bool) -> None:
    case = Case(rows=9, splits=2, norm=True, row_norm=row_norm)
    inputs = case.inputs()
    q, k, v = case.run(**inputs)
    for row in range(case.rows):
        one = {
            name: (a[:, row : row + 1] if name == "qkv" else a[row : row + 1]).copy()
            for name, a in inputs.items()
            if not name.endswith("norm")
        }
        norms = {name: inputs[name] for name in ("q_norm", "k_norm")}
        q_one, k_one, v_one = case.run(**one, **norms)
        np.testing.assert_array_equal(q_one[0], q[row])
        slot = inputs["slots"][row]
        np.testing.assert_array_equal(k_one[slot], k[slot])
        np.testing.assert_array_equal(v_one[slot], v[slot])


def test_values_are_rounded_once_to_nearest_even() -> None:
    case = Case(heads=1, kv_heads=1, head_dim=8, half_dim=0, rows=1)
    inputs = case.inputs()
    ties = np.float32(1) + np.arange(8, dtype=np.float32) * np.float32(2.0**-8)
    inputs["qkv"] = np.tile(ties, 3).reshape(1, 1, -1)
    q, k, v = case.run(**inputs)
    for got in (q[0, 0], k[inputs["slots"][0], 0], v[inputs["slots"][0], 0]):
        np.testing.assert_array_equal(got, round_trip(ties, "bf16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": np.zeros((1, 5, 8), np.float32)}, "qkv: got"),
        ({"qkv": np.zeros((0, 5, 112), np.float32)}, "qkv: got"),
        ({"slots": np.zeros(4, np.int64)}, "slots: got 4, expected 5"),
        ({"slots": np.full(5, 64, np.int64)}, "slots: got 64, expected -1 to 63"),
        ({"cos": np.zeros((5, 7), np.float32)}, "cos, sin: got"),
        ({"cos": np.zeros((5, 9), np.float32), "sin": np.zeros((5, 9), np.float32)}, "half_dim"),
        ({"q_norm": np.zeros(15, np.float32)}, "q_norm: got 15, expected 16"),
        ({"q_norm": None}, "q_norm, k_norm: expected both or none"),
    ],
)
def test_wrong_arguments_are_refused(
    changes: dict[str, npt.NDArray[np.generic]], message: str
) -> None:
    case = Case(norm=True)
    with pytest.raises(ValueError, match=message):
        case.run(**{**case.inputs(), **changes})


@pytest.mark.parametrize("head_dim", [12, 264])
def test_head_sizes_that_no_kernel_takes_are_refused(head_dim: int) -> None:
    case = Case(head_dim=head_dim, half_dim=0)
    with pytest.raises(ValueError, match=f"head_dim: got {head_dim}"):
        case.run(**case.inputs())


def test_repeats_are_timed_and_change_nothing() -> None:
    inputs = Case().inputs()
    for name in ("q_norm", "k_norm"):
        del inputs[name]
    caches = [cuda_ops.PagedCache(4, 16, 2, 16) for _ in range(2)]
    expected = caches[0].write(**inputs)
    q, microseconds = caches[1].write(**inputs, repeats=3)
    assert microseconds.shape == (3,)
    np.testing.assert_array_equal(q, expected)
    np.testing.assert_array_equal(caches[1].read(), caches[0].read())
