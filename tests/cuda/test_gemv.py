"""Plain weights: dot products for few rows and the library's for many, against numpy in float64.

The emulated library sums in an order of its own, a real one in whatever order it likes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.quant import encode, round_trip

ROUNDING = 2.0**-24
LANES = 32
# Of gate(), relative: exp2 within 2 ulp, and its argument (up to 16) rounded twice; some products.
GATE_ERROR = 64 * ROUNDING
GATE_SLOPE = 1.13  # largest derivative of both activations
HALF_UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}  # of 8 and 11 bits
SMALLEST_UNIT = 2.0**-25  # half of f16's smallest subnormal

HALVES = ["bf16", "f16"]
# Around the 256 columns of a warp's step, the two or four steps loaded ahead, and one lane of them.
COLS = [8, 16, 248, 256, 264, 520, 1016, 1032]
OUTPUTS = [1, 2, 3, 4, 5, 7, 8, 9, 17]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Matrix:
    """A plain weight with its bias, on the device and in numpy."""

    rows: int
    cols: int
    half: str = "bf16"
    biased: bool = True
    seed: int = 0

    @cached_property
    def values(self) -> Floats:
        random = np.random.default_rng((self.rows, self.cols, self.seed))
        matrix = random.standard_normal((self.rows, self.cols)) / 4
        return round_trip(matrix.astype(np.float32), self.half)

    @cached_property
    def packed(self) -> cuda_ops.PackedWeight:
        data = np.frombuffer(encode(self.values, "f32"), np.uint8)
        return cuda_ops.PackedWeight(data, "f32", self.rows, self.cols, half=self.half, plain=True)

    @cached_property
    def bias(self) -> Floats | None:
        random = np.random.default_rng(self.seed)
        return random.standard_normal(self.rows).astype(np.float32) if self.biased else None

    def product(self, x: Floats, additions: int | None = None) -> tuple[Doubles, Doubles]:
        """W x + bias [n, rows] of rounded x, and how far a sum may be off that rounds
        ``additions`` times (None: as gemv does)."""
        if additions is None:
            additions = -(-self.cols // LANES) + 5 + 8
        values = self.values.astype(np.float64)
        rounded = round_trip(x, self.half).astype(np.float64)
        bias = np.zeros(self.rows) if self.bias is None else self.bias.astype(np.float64)
        bound = (additions + 1) * ROUNDING * (np.abs(rounded) @ np.abs(values).T + np.abs(bias))
        return rounded @ values.T + bias, bound


def inputs(n: int, cols: int) -> Floats:
    return np.random.default_rng((n, cols)).standard_normal((n, cols)).astype(np.float32)


def assert_within(actual: npt.ArrayLike, value: Doubles, bound: Doubles) -> None:
    excess = np.abs(np.asarray(actual, np.float64) - value) - bound
    assert (excess <= 0).all(), f"beyond the bound by {excess.max()}"  # NaN is not <= 0


def gemv(x: Floats, *matrices: Matrix, **options: int) -> Floats:
    """[n, outputs]; always one partial sum."""
    weights, biases = [m.packed for m in matrices], [m.bias for m in matrices]
    (only,) = cuda_ops.linear(x, weights, biases, plain=True, **options)
    return only


def check(n: int, *matrices: Matrix, **options: int) -> None:
    x = inputs(n, matrices[0].cols)
    products = [m.product(x) for m in matrices]
    value, bound = (np.concatenate(each, axis=1) for each in zip(*products, strict=True))
    assert_within(gemv(x, *matrices, **options), value, bound)


# -------------------------------------------------------------------------------------------- gemv
@pytest.mark.parametrize("half", HALVES)
def test_rows(half: str) -> None:
    for n in range(9):
        check(n, Matrix(9, 160, half))


@pytest.mark.parametrize("cols", COLS)
def test_shapes(cols: int) -> None:
    for outputs in OUTPUTS:
        check(3, Matrix(outputs, cols))
    check(8, Matrix(9, cols))


def test_a_real_layer() -> None:
    check(1, Matrix(576, 1536))


@pytest.mark.parametrize("n", [1, 3, 8])
def test_matrices_side_by_side(n: int) -> None:
    q, k, v = Matrix(73, 160, seed=1), Matrix(8, 160, biased=False), Matrix(17, 160, seed=3)
    check(n, q, k, v)
    check(n, k, v)


@pytest.mark.parametrize("n", [1, 8])
def test_columns_beyond_a_row_are_not_read(n: int) -> None:
    matrix = Matrix(9, 136)
    check(n, matrix, x_stride=152)  # NaN lies between the rows


@pytest.mark.parametrize("half", HALVES)
def test_every_weight_is_exact(half: str) -> None:
    matrix = Matrix(9, 264, half, biased=False)
    unit = np.eye(264, dtype=np.float32)
    for begin in (0, 128, 248, 256):
        rows = slice(begin, begin + 8)
        np.testing.assert_array_equal(gemv(unit[rows], matrix), matrix.values.T[rows])


def test_a_row_that_is_not_finite_stays_alone() -> None:
    matrix = Matrix(9, 160)
    x = inputs(4, 160)
    expected = gemv(x, matrix)
    x[1], x[2, 5] = np.nan, np.inf
    got = gemv(x, matrix)
    np.testing.assert_array_equal(got[[0, 3]], expected[[0, 3]])
    assert not np.isfinite(got[[1, 2]]).any()


def test_a_row_has_the_same_bits_with_any_number_of_rows() -> None:
    matrix = Matrix(9, 1032)
    gate, up = Matrix(9, 1032, seed=1), Matrix(9, 1032, seed=2)
    x = inputs(8, 1032)
    expected, gates = gemv(x, matrix), gated(x, gate, up)
    for n in (1, 2, 3, 4, 5):
        np.testing.assert_array_equal(gemv(x[:n], matrix), expected[:n])
        np.testing.assert_array_equal(gated(x[:n], gate, up), gates[:n])


# ------------------------------------------------------------------------------------------- gated
def silu(v: Doubles) -> Doubles:
    return v / (1 + np.exp(-v))


def gelu_tanh(v: Doubles) -> Doubles:
    return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def gated(x: Floats, gate: Matrix, up: Matrix, **options: int | str) -> Floats:
    biases = {"gate_bias": gate.bias, "up_bias": up.bias}
    return cuda_ops.gated_linear(x, gate.packed, up.packed, plain=True, **biases, **options)


def check_gated(n: int, gate: Matrix, up: Matrix, activation: str = "silu") -> None:
    x = inputs(n, gate.cols)
    (g, g_bound), (u, u_bound) = gate.product(x), up.product(x)
    a = ACTIVATIONS[activation](g)
    floats = GATE_SLOPE * g_bound * (np.abs(u) + u_bound) + np.abs(a) * u_bound
    floats += GATE_ERROR * np.abs(a * u)
    bound = floats + HALF_UNIT[gate.half] * (np.abs(a * u) + floats) + SMALLEST_UNIT
    assert_within(gated(x, gate, up, activation=activation), a * u, bound)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", HALVES)
def test_gated_rows(half: str, activation: str) -> None:
    gate, up = (Matrix(9, 160, half, seed=seed) for seed in (1, 2))
    for n in range(9):
        check_gated(n, gate, up, activation)


@pytest.mark.parametrize("cols", COLS)
def test_gated_shapes(cols: int) -> None:
    for outputs in OUTPUTS:
        check_gated(2, *(Matrix(outputs, cols, biased=False, seed=seed) for seed in (1, 2)))
    check_gated(8, *(Matrix(7, cols, seed=seed) for seed in (1, 2)))


# ------------------------------------------------------------------------------------- the library
def gemm(x: Floats, matrix: Matrix, **options: int | bool) -> Floats:
    return cuda_ops.gemm(x, matrix.packed, matrix.bias, **options)


@pytest.fixture(scope="module")
def _library() -> None:
    try:
        gemm(inputs(1, 8), Matrix(8, 8))
    except cuda_ops.DeviceError as error:
        if "pip install nvidia-cublas" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("half", HALVES)
def test_products_of_the_library(half: str, biased: bool) -> None:
    for n, outputs, cols in ((1, 8, 8), (9, 33, 40), (17, 64, 160), (40, 301, 64)):
        matrix = Matrix(outputs, cols, half, biased)
        x = inputs(n, cols)
        for recorded in (False, True):
            assert_within(gemm(x, matrix, recorded=recorded), *matrix.product(x, additions=cols))


@pytest.mark.usefixtures("_library")
def test_the_library_keeps_to_its_columns() -> None:
    matrix = Matrix(24, 40)
    x = inputs(9, 40)
    got = gemm(x, matrix, x_stride=48, y_stride=56)
    assert_within(got[:, :24], *matrix.product(x, additions=40))
    assert np.isnan(got[:, 24:]).all()


@pytest.mark.usefixtures("_library")
def test_no_rows_are_no_product() -> None:
    assert gemm(inputs(0, 40), Matrix(8, 40)).shape == (0, 8)


# ------------------------------------------------------------------------------------------- rules
def test_wrong_arguments_are_refused() -> None:
    matrix = Matrix(9, 160)
    x = inputs(3, 160)
    data = np.frombuffer(encode(matrix.values, "f32"), np.uint8)
    panels = cuda_ops.PackedWeight(data, "f32", 9, 160)
    with pytest.raises(ValueError, match="got 9 rows, expected at most 8"):
        gemv(inputs(9, 160), matrix)
    with pytest.raises(ValueError, match="got 2 splits, expected 1"):
        gemv(x, matrix, splits=2)
    with pytest.raises(ValueError, match="expected plain weights of 160 columns"):
        gemv(x, matrix, Matrix(9, 128))
    with pytest.raises(ValueError, match="expected plain weights of 160 columns"):
        cuda_ops.linear(x, [panels], plain=True)
    with pytest.raises(ValueError, match="expected multiples of 8"):
        gemv(x, matrix, x_stride=161)
    with pytest.raises(ValueError, match="gate and up differ in rows"):
        gated(x, matrix, Matrix(8, 160))
    with pytest.raises(ValueError, match="got a plain weight, expected one in panels"):
        cuda_ops.linear(x, [matrix.packed])
