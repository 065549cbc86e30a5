"""Linear and gated linear layers of CUDA against numpy in float64, and their forms against each
other bit by bit. The emulated mma truncates as a tree, so that no loop of additions in another
order gives the same bits by luck."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.cuda_weights import PackedWeight, unpack_parts
from reference.linear import Blocks
from reference.quant import block_length, encode, round_trip

# An mma adds sixteen products to a sum: 17 numbers, each cut off below 2^-23 of the largest, which
# is at most the sum of magnitudes so far. Scales and minimums round twice for two such steps, a
# bias and the sum of splits once for all: one step more covers them.
STEP_ERROR = 17 * 2.0**-23
STEP_COLS = 16
# Of gate(), relative: exp2 within 2 ulp, and its argument (up to 16) rounded twice; some products.
GATE_ERROR = 64 * 2.0**-24
GATE_SLOPE = 1.13  # largest derivative of both activations
HALF_UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}  # of 8 and 11 bits
SMALLEST_UNIT = 2.0**-25  # half of f16's smallest subnormal

HALVES = ["bf16", "f16"]
FORMATS = ["f32", "q8_0", "q4_0", "q4_1"]  # f32: packed as halves
# Around the forms of 8, 64 and 128 tokens, and the 32 tokens that travel together in them.
ROWS = [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129]
# Around the units of 128 columns, and the chunks and groups inside; low-bit rows are whole blocks.
COLS = [8, 32, 40, 96, 128, 136, 264, 544]
# Formats whose codes lie in planes or whose scales are those of 16 columns, one dtype each.
PLANES = ["q2_k", "q3_k", "q5_0", "q6_k"]
SHAPES = [(dtype, cols) for dtype in FORMATS for cols in COLS if dtype == "f32" or cols % 32 == 0]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Matrix:
    """A weight with its bias, on the device and in numpy."""

    rows: int
    cols: int
    dtype: str = "f32"
    half: str = "bf16"
    biased: bool = True
    seed: int = 0

    @cached_property
    def data(self) -> bytes:
        random = np.random.default_rng((self.rows, self.cols, self.seed))
        return encode(random.standard_normal((self.rows, self.cols)) / 4, self.dtype)

    @cached_property
    def packed(self) -> cuda_ops.PackedWeight:
        data = np.frombuffer(self.data, np.uint8)
        return cuda_ops.PackedWeight(data, self.dtype, self.rows, self.cols, half=self.half)

    @cached_property
    def bias(self) -> Floats | None:
        random = np.random.default_rng(self.seed)
        return random.standard_normal(self.rows).astype(np.float32) if self.biased else None

    @cached_property
    def parts(self) -> tuple[Doubles, Doubles]:
        """Values and magnitudes [rows, cols]: a code and its minimum may cancel."""
        if self.dtype == "f32":
            values = np.frombuffer(self.data, np.float32).reshape(self.rows, self.cols)
            halves = round_trip(values, self.half).astype(np.float64)
            return halves, np.abs(halves)
        if self.dtype not in FORMATS:  # as the device has them: test_cuda_weights.py
            bytes_ = self.packed.read()
            packed = PackedWeight(self.packed.format, self.half, self.rows, self.cols, *bytes_)
            scaled, minimums = unpack_parts(packed)
            return scaled + minimums, np.abs(scaled) + np.abs(minimums)
        blocks = Blocks.parse(self.data, self.dtype, self.rows)
        magnitudes = np.abs(blocks.codes) * np.repeat(np.abs(blocks.scales), 32, axis=1)
        if blocks.minimums is not None:
            magnitudes = magnitudes + np.repeat(np.abs(blocks.minimums), 32, axis=1)
        return blocks.values, magnitudes

    def product(self, x: Floats) -> tuple[Doubles, Doubles]:
        """W x + bias [n, rows] of rounded x, and how far a kernel may be off."""
        values, magnitudes = self.parts
        rounded = round_trip(x, self.half).astype(np.float64)
        bias = np.zeros(self.rows) if self.bias is None else self.bias.astype(np.float64)
        steps = -(-self.cols // STEP_COLS) + 1
        bound = steps * STEP_ERROR * (np.abs(rounded) @ magnitudes.T + np.abs(bias))
        return rounded @ values.T + bias, bound


@dataclass(frozen=True)
class Layer:
    """Matrices side by side."""

    matrices: tuple[Matrix, ...]
    options: dict[str, int] = field(default_factory=dict)

    def run(self, x: Floats, **options: int) -> Floats:
        """The partial sums [partials, n, outputs]."""
        return cuda_ops.linear(
            x,
            [m.packed for m in self.matrices],
            [m.bias for m in self.matrices],
            **{**self.options, **options},
        )

    def check(self, n: int, **options: int) -> None:
        x = inputs(n, self.matrices[0].cols)
        partials = self.run(x, **options)
        value, bound = (
            np.concatenate(each, axis=1)
            for each in zip(*(m.product(x) for m in self.matrices), strict=True)
        )
        assert partials.shape[1:] == value.shape
        assert_within(partials.astype(np.float64).sum(axis=0), value, bound)


def inputs(n: int, cols: int) -> Floats:
    return np.random.default_rng((n, cols)).standard_normal((n, cols)).astype(np.float32)


def assert_within(actual: npt.ArrayLike, value: Doubles, bound: Doubles) -> None:
    excess = np.abs(np.asarray(actual, np.float64) - value) - bound
    assert (excess <= 0).all(), f"beyond the bound by {excess.max()}"  # NaN is not <= 0


def layer(rows: int = 9, cols: int = 160, dtype: str = "f32", half: str = "bf16") -> Layer:
    return Layer((Matrix(rows, cols, dtype, half),))


def add_in_order(partials: Floats) -> Floats:
    total = partials[0].copy()
    for partial in partials[1:]:
        total += partial
    return total


# ------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_rows(dtype: str, half: str) -> None:
    some = layer(dtype=dtype, half=half)
    for n in ROWS:
        some.check(n)


@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 65])
@pytest.mark.parametrize(("dtype", "cols"), SHAPES)
def test_shapes(dtype: str, cols: int, outputs: int) -> None:
    layer(outputs, cols, dtype).check(3)


@pytest.mark.parametrize(("outputs", "cols"), [(1, 8), (129, 40), (65, 264)])
def test_shapes_of_many_rows(outputs: int, cols: int) -> None:
    for n in (33, 70):
        layer(outputs, cols).check(n)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_real_layer(dtype: str) -> None:
    splits = cuda_ops.linear_splits(576, 1536)
    assert splits == 4
    layer(576, 1536, dtype).check(3, splits=splits)


@pytest.mark.parametrize("n", [5, 40, 70])
@pytest.mark.parametrize("dtype", ["f32", "q4_0"])
def test_matrices_side_by_side(dtype: str, n: int) -> None:
    q, k, v = (
        Matrix(rows, 160, dtype, biased=biased, seed=seed)
        for seed, (rows, biased) in enumerate([(72, True), (8, False), (17, True)])
    )
    Layer((q, k, v)).check(n)
    Layer((q, k)).check(n, splits=2)


@pytest.mark.parametrize("n", [3, 20, 70])
@pytest.mark.parametrize("splits", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", FORMATS)
def test_splits(dtype: str, splits: int, n: int) -> None:
    partials = layer(9, 544, dtype).run(inputs(n, 544), splits=splits)
    assert len(partials) == (splits if n <= 64 else 1) == cuda_ops.linear_partials(n, splits)
    layer(9, 544, dtype).check(n, splits=splits)


@pytest.mark.parametrize("n", [3, 20, 70])
def test_columns_beyond_a_row_are_not_read(n: int) -> None:
    some = layer(9, 136)
    some.check(n, x_stride=152)  # NaN lies between the rows
    x = inputs(n, 136)
    np.testing.assert_array_equal(some.run(x, x_stride=152), some.run(x))


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_weight_is_exact(dtype: str, half: str) -> None:
    """The unit vectors give the matrix: one product each, rounded once where there is a minimum."""
    matrix = Matrix(65, 256, dtype, half, biased=False)
    expected = matrix.parts[0].astype(np.float32).T
    unit = np.eye(256, dtype=np.float32)
    for n in (8, 64, 256):
        np.testing.assert_array_equal(Layer((matrix,)).run(unit[:n])[0], expected[:n])


def test_all_codes_of_eight_bits() -> None:
    codes = np.arange(-128, 128).reshape(2, 128)
    blocks = Blocks("q8_0", codes, np.ones((2, 4), np.float32))
    for half in HALVES:
        weight = cuda_ops.PackedWeight(blocks.data, "q8_0", 2, 128, half=half)
        got = cuda_ops.linear(np.eye(128, dtype=np.float32), [weight])
        np.testing.assert_array_equal(got[0], codes.T)


@pytest.mark.parametrize("n", [3, 40, 70])
def test_a_row_that_is_not_finite_stays_alone(n: int) -> None:
    some = layer()
    x = inputs(n, 160)
    expected = some.run(x)
    x[1], x[2, 5] = np.nan, np.inf
    got = some.run(x)
    np.testing.assert_array_equal(
        np.delete(got, [1, 2], axis=1), np.delete(expected, [1, 2], axis=1)
    )
    assert not np.isfinite(got[0, [1, 2]]).any()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", PLANES)
def test_codes_in_planes(dtype: str, half: str) -> None:
    """Every form, with a last unit that 5-bit codes alone leave half empty; the unit vectors give
    the matrix."""
    cols = 544 if dtype == "q5_0" else 512
    for n, splits in ((3, 1), (9, 3), (70, 1), (70, 2)):
        layer(65, cols, dtype, half).check(n, splits=splits)
    matrix = Matrix(17, 256, dtype, half, biased=False)
    expected = matrix.parts[0].astype(np.float32).T
    unit = np.eye(256, dtype=np.float32)
    for n in (8, 64, 130):
        np.testing.assert_array_equal(Layer((matrix,)).run(unit[:n])[0], expected[:n])


@pytest.mark.parametrize("dtype", ["q5_1", "q4_k", "q5_k"])
def test_other_blocks(dtype: str) -> None:
    layer(17, 2 * block_length(dtype), dtype).check(3)


# ------------------------------------------------------------------------------------------- gated
def silu(v: Doubles) -> Doubles:
    return v / (1 + np.exp(-v))


def gelu_tanh(v: Doubles) -> Doubles:
    return 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


@dataclass(frozen=True)
class Gated:
    gate: Matrix
    up: Matrix
    activation: str = "silu"

    def run(self, x: Floats, **options: int) -> Floats:
        return cuda_ops.gated_linear(
            x,
            self.gate.packed,
            self.up.packed,
            activation=self.activation,
            gate_bias=self.gate.bias,
            up_bias=self.up.bias,
            **options,
        )

    def check(self, n: int, **options: int) -> None:
        x = inputs(n, self.gate.cols)
        (g, g_bound), (u, u_bound) = self.gate.product(x), self.up.product(x)
        a = ACTIVATIONS[self.activation](g)
        floats = GATE_SLOPE * g_bound * (np.abs(u) + u_bound) + np.abs(a) * u_bound
        floats += GATE_ERROR * np.abs(a * u)
        bound = floats + HALF_UNIT[self.gate.half] * (np.abs(a * u) + floats) + SMALLEST_UNIT
        assert_within(self.run(x, **options), a * u, bound)


def gated(
    rows: int = 9,
    cols: int = 160,
    dtype: str = "f32",
    half: str = "bf16",
    activation: str = "silu",
    biased: bool = True,
) -> Gated:
    gate, up = (Matrix(rows, cols, dtype, half, biased, seed) for seed in (1, 2))
    return Gated(gate, up, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_gated_rows(dtype: str, half: str, activation: str) -> None:
    some = gated(dtype=dtype, half=half, activation=activation)
    for n in (0, 1, 8, 9, 33, 64, 65, 129):
        some.check(n)


@pytest.mark.parametrize("outputs", [1, 7, 8, 33, 65])
@pytest.mark.parametrize("cols", [8, 40, 264])
def test_gated_shapes(cols: int, outputs: int) -> None:
    for n in (3, 9, 65):
        gated(outputs, cols, biased=False).check(n)
    gated(outputs, cols).check(3, x_stride=cols + 8)


@pytest.mark.parametrize("dtype", PLANES)
def test_gated_codes_in_planes(dtype: str) -> None:
    for n in (3, 9, 65):
        gated(33, 256, dtype).check(n)


def test_a_real_gated_layer() -> None:
    gated(1536, 576, "q8_0").check(3)


# -------------------------------------------------------------------------------------------- bits
@pytest.mark.parametrize("dtype", PLANES)
def test_a_row_of_planes_has_the_same_bits_in_every_batch(dtype: str) -> None:
    x = inputs(129, 256)
    some, both = layer(17, 256, dtype), gated(17, 256, dtype)
    plain, gates = some.run(x)[0], both.run(x)
    for n in (1, 9, 65):
        np.testing.assert_array_equal(some.run(x[:n])[0], plain[:n])
        np.testing.assert_array_equal(both.run(x[:n]), gates[:n])
        np.testing.assert_array_equal(some.run(x[-n:])[0], plain[-n:])


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_row_has_the_same_bits_in_every_batch(dtype: str, half: str) -> None:
    x = inputs(129, 288)
    some = layer(17, 288, dtype, half)
    both = gated(17, 288, dtype, half)
    plain, gates = some.run(x)[0], both.run(x)
    for n in (1, 7, 8, 9, 32, 33, 64, 65, 128):
        np.testing.assert_array_equal(some.run(x[:n])[0], plain[:n])
        np.testing.assert_array_equal(both.run(x[:n]), gates[:n])
    for row in (6, 7, 31, 63, 64, 128):
        np.testing.assert_array_equal(some.run(x[row : row + 1])[0], plain[row : row + 1])
        np.testing.assert_array_equal(both.run(x[row : row + 1]), gates[row : row + 1])


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("dtype", FORMATS)
def test_merged_splits_are_the_sum_of_partials_in_order(dtype: str, splits: int) -> None:
    x = inputs(70, 544)
    some = layer(9, 544, dtype)
    merged = some.run(x, splits=splits)
    assert len(merged) == 1
    for n in (1, 8, 64):
        partials = some.run(x[:n], splits=splits)
        assert len(partials) == splits
        np.testing.assert_array_equal(add_in_order(partials), merged[0, :n])


def test_a_matrix_has_the_same_bits_beside_others() -> None:
    matrices = tuple(Matrix(rows, 160, seed=rows) for rows in (72, 8, 17))
    for n in (3, 70):
        x = inputs(n, 160)
        alone = [Layer((m,)).run(x) for m in matrices]
        np.testing.assert_array_equal(Layer(matrices).run(x), np.concatenate(alone, axis=2))


# ------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize(("outputs", "cols"), [(1, 8), (64, 4096), (576, 1536), (4096, 14336)])
def test_splits_of_a_layer(outputs: int, cols: int) -> None:
    splits = cuda_ops.linear_splits(outputs, cols)
    assert splits in (1, 2, 4, 8)
    assert splits == 1 or cols >= 256 * splits
    assert splits == 8 or cols < 512 * splits or -(-outputs // 64) * splits >= 128


def test_many_rows_merge_their_splits() -> None:
    assert [cuda_ops.linear_partials(n, 4) for n in (1, 64, 65, 1000)] == [4, 4, 1, 1]


def test_wrong_arguments_are_refused() -> None:
    some, other = Matrix(9, 160), Matrix(9, 128)
    x = inputs(3, 160)
    with pytest.raises(ValueError, match="got 3 splits of 160 columns, expected 1 to 2"):
        Layer((some,)).run(x, splits=3)
    with pytest.raises(ValueError, match="got 0 splits"):
        Layer((some,)).run(x, splits=0)
    with pytest.raises(ValueError, match="segments differ in format or columns"):
        Layer((some, other)).run(x)
    with pytest.raises(ValueError, match="segments differ in format or columns"):
        Layer((some, Matrix(9, 160, "q8_0"))).run(x)
    with pytest.raises(ValueError, match="expected multiples of 8"):
        Layer((some,)).run(x, x_stride=161)
    with pytest.raises(ValueError, match="gate and up differ in format or shape"):
        Gated(some, Matrix(8, 160)).run(x)
    with pytest.raises(ValueError, match="gate and up differ in format or shape"):
        Gated(some, Matrix(9, 160, "q8_0")).run(x)
