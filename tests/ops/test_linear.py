"""Matrix products of every weight format on every instruction set against numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from reference.linear import Blocks, multiply, multiply_bf16, multiply_quantized, quantize_rows
from reference.quant import LOW_BIT, block_length, decode, encode, round_trip

ISAS = _core.build_info()["isas"]
FLOATS = ["f32", "f16", "bf16"]
# [n, cols, rows]: below, at and above the width of a panel (16), a group (32) and a row tile (2,
# 4 or 8). Rows of blocks of 256 are as many blocks long as these are of 256.
FLOAT_SHAPES = [
    (1, 1, 1), (2, 2, 15), (3, 15, 16), (7, 16, 17), (8, 17, 31), (9, 31, 33), (20, 33, 48),
    (5, 576, 192),
]  # fmt: skip
LOW_BIT_SHAPES = [
    (1, 32, 1), (2, 32, 15), (3, 64, 16), (7, 96, 17), (8, 96, 31), (9, 128, 33), (20, 160, 48),
    (5, 576, 192),
]  # fmt: skip

MINIMUMS = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")

Floats = npt.NDArray[np.float32]
pytestmark = pytest.mark.parametrize("isa", ISAS)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pack(
    data: bytes, dtype: str, shape: Sequence[int], compute: str = "auto"
) -> _core.PackedMatrix:
    return _core.PackedMatrix(np.frombuffer(data, np.uint8), dtype, *shape, compute=compute)


def pack_blocks(blocks: Blocks) -> _core.PackedMatrix:
    return _core.PackedMatrix(blocks.data, blocks.dtype, *blocks.codes.shape)


def whole_blocks(dtype: str, cols: int) -> int:
    return -(-cols // block_length(dtype)) * block_length(dtype)


def random_blocks(dtype: str, rows: int, cols: int, seed: int = 0) -> Blocks:
    return Blocks.parse(encode(normal(rows, cols, seed=seed), dtype), dtype, rows)


def uniform_blocks(dtype: str, codes: npt.ArrayLike, scale: float, minimum: float) -> Blocks:
    codes = np.atleast_2d(np.asarray(codes, np.int64))
    group = 16 if dtype in ("q2_k", "q3_k", "q6_k") else 32
    ones = np.ones((len(codes), codes.shape[1] // group), np.float32)
    minimums = ones * np.float32(minimum) if dtype in MINIMUMS else None
    return Blocks(dtype, codes, ones * np.float32(scale), minimums)


def extreme_codes(dtype: str) -> tuple[int, int]:
    bits = int(dtype[1])
    return (0, 2**bits - 1) if dtype in MINIMUMS else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize(("n", "cols", "rows"), FLOAT_SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_float_matrices_in_float32(isa: str, dtype: str, n: int, cols: int, rows: int) -> None:
    x, w = normal(n, cols), normal(rows, cols, seed=1)
    matrix = pack(encode(w, dtype), dtype, w.shape, compute="float32")
    multiply(x, round_trip(w, dtype)).check(matrix.multiply(x, isa=isa))


@pytest.mark.parametrize(("n", "cols", "rows"), FLOAT_SHAPES)
@pytest.mark.parametrize(
    ("dtype", "compute"), [("bf16", "auto"), ("f16", "auto"), ("f32", "bfloat16")]
)
def test_float_matrices_in_bf16(
    isa: str, dtype: str, compute: str, n: int, cols: int, rows: int
) -> None:
    x, w = normal(n, cols), normal(rows, cols, seed=1)
    matrix = pack(encode(w, dtype), dtype, w.shape, compute=compute)
    stored = round_trip(w, dtype)
    multiply_bf16(x, stored).check(matrix.multiply(x, isa=isa))
    multiply(x, round_trip(stored, "bf16")).check(matrix.multiply(x, isa=isa, float_acts=True))


@pytest.mark.parametrize(("n", "cols", "rows"), LOW_BIT_SHAPES)
@pytest.mark.parametrize("dtype", LOW_BIT)
def test_low_bit_matrices_with_float_activations(
    isa: str, dtype: str, n: int, cols: int, rows: int
) -> None:
    cols = whole_blocks(dtype, cols)
    x, blocks = normal(n, cols), random_blocks(dtype, rows, cols)
    expected = multiply(x, decode(blocks.data.tobytes(), dtype, (rows, cols)))
    expected.check(pack_blocks(blocks).multiply(x, isa=isa, float_acts=True))


@pytest.mark.parametrize(("n", "cols", "rows"), LOW_BIT_SHAPES)
@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("dtype", LOW_BIT)
def test_low_bit_matrices_with_int8_activations(
    isa: str, dtype: str, fine: bool, n: int, cols: int, rows: int
) -> None:
    cols = whole_blocks(dtype, cols)
    x, blocks = normal(n, cols), random_blocks(dtype, rows, cols)
    actual = pack_blocks(blocks).multiply(x, isa=isa, fine=fine)
    multiply_quantized(x, blocks, fine).check(actual)
    # Half a step of the codes, per element, from the float product.
    steps = np.repeat(quantize_rows(x, fine).scales, 16, axis=1) * 0.51
    assert (np.abs(actual - x @ blocks.values.T) <= steps @ np.abs(blocks.values).T).all()


def test_fine_activations_keep_the_small_half_beside_an_outlier(isa: str) -> None:
    x = np.full((1, 32), 0.01, np.float32)
    x[0, 31] = 1000.0
    blocks = uniform_blocks("q8_0", np.where(np.arange(32) < 16, 100, 0), 1.0, 0.0)
    matrix = pack_blocks(blocks)
    assert matrix.multiply(x, isa=isa)[0, 0] == 0.0
    assert matrix.multiply(x, isa=isa, fine=True)[0, 0] == pytest.approx(16.0, rel=1e-6)


# Saturation: every code and every activation at its largest, in all combinations of signs.


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 9])
@pytest.mark.parametrize("dtype", LOW_BIT)
def test_extreme_codes_and_activations(isa: str, dtype: str, n: int, fine: bool) -> None:
    low, high = extreme_codes(dtype)
    cols = whole_blocks(dtype, 64)
    signs = np.arange(cols) % 2 == 0
    codes = [np.full(cols, low), np.full(cols, high), np.where(signs, low, high)]
    codes.append(np.where(np.arange(cols) % 4 < 2, low, high))
    blocks = uniform_blocks(dtype, np.stack(codes), 1.0, -0.5)
    patterns = [np.ones(cols), -np.ones(cols), np.where(signs, 1, -1), np.where(signs, -1, 1)]
    x = np.stack([patterns[i % 4] * 127 for i in range(n)]).astype(np.float32)
    # Scales are 1 and every sum is a small multiple of 0.5: float32 holds the result exactly.
    np.testing.assert_array_equal(
        pack_blocks(blocks).multiply(x, isa=isa, fine=fine), x.astype(np.float64) @ blocks.values.T
    )


@pytest.mark.parametrize("value", [2.0**100, 2.0**-100, 1e-30, 1e35])
@pytest.mark.parametrize("dtype", LOW_BIT)
def test_huge_and_tiny_activations(isa: str, dtype: str, value: float) -> None:
    cols = whole_blocks(dtype, 64)
    blocks = uniform_blocks(dtype, np.tile([1, 0, 2, 3], cols // 4), 2.0**-14, 2.0**-10)
    x = (normal(3, cols).clip(-1, 1) * value).astype(np.float32)
    multiply_quantized(x, blocks, False).check(pack_blocks(blocks).multiply(x, isa=isa))


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-14, 65504.0, 0.0])
@pytest.mark.parametrize("dtype", LOW_BIT)
def test_huge_and_tiny_scales(isa: str, dtype: str, scale: float) -> None:
    low, high = extreme_codes(dtype)
    cols = whole_blocks(dtype, 96)
    codes = np.random.default_rng(2).integers(low, high + 1, (17, cols))
    blocks = uniform_blocks(dtype, codes, scale, -scale)
    x = normal(9, cols)
    multiply_quantized(x, blocks, False).check(pack_blocks(blocks).multiply(x, isa=isa))
    multiply(x, blocks.values).check(pack_blocks(blocks).multiply(x, isa=isa, float_acts=True))


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, *LOW_BIT])
def test_a_row_of_zeros_gives_zeros(isa: str, dtype: str, fine: bool) -> None:
    cols = whole_blocks(dtype, 64)
    w, x = normal(17, cols), normal(3, cols)
    x[1] = 0.0
    y = pack(encode(w, dtype), dtype, w.shape).multiply(x, isa=isa, fine=fine)
    assert (y[1] == 0.0).all()
    assert (y[[0, 2]] != 0.0).all()


@pytest.mark.parametrize("dtype", [*FLOATS, *LOW_BIT])
def test_no_rows_give_no_rows(isa: str, dtype: str) -> None:
    w = normal(17, whole_blocks(dtype, 32))
    y = pack(encode(w, dtype), dtype, w.shape).multiply(normal(0, w.shape[1]), isa=isa)
    assert y.shape == (0, 17)


@pytest.mark.parametrize("form", [{}, {"fine": True}, {"float_acts": True}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [*FLOATS, *LOW_BIT])
def test_what_is_not_finite_is_not_lost(
    isa: str, dtype: str, value: float, form: dict[str, bool]
) -> None:
    cols = whole_blocks(dtype, 64)
    w, x = normal(17, cols), normal(3, cols)
    x[1, 40] = value
    y = pack(encode(w, dtype), dtype, w.shape).multiply(x, isa=isa, **form)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("value", [1e-37, 1e-38, 1e-41, 1e-45])
def test_activations_whose_inverse_overflows(isa: str, value: float, fine: bool) -> None:
    blocks = uniform_blocks("q8_0", np.full((1, 32), 127), 1.0, 0.0)
    x = np.zeros((1, 32), np.float32)
    x[0, 5] = value
    y = pack_blocks(blocks).multiply(x, isa=isa, fine=fine)
    assert 0.0 <= y[0, 0] <= 200 * value


@pytest.mark.parametrize("form", [{}, {"fine": True}, {"float_acts": True}], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *LOW_BIT])
def test_a_row_has_the_same_bits_in_any_company(
    isa: str, dtype: str, form: dict[str, bool]
) -> None:
    cols = whole_blocks(dtype, 160)
    w, x = normal(40, cols), normal(20, cols, seed=1)
    matrix = pack(encode(w, dtype), dtype, w.shape)
    alone = np.concatenate([matrix.multiply(x[i : i + 1], isa=isa, **form) for i in range(len(x))])
    for n in range(1, 21):
        for threads in (1, 2):
            y = matrix.multiply(x[:n], isa=isa, threads=threads, **form)
            np.testing.assert_array_equal(y, alone[:n])
    np.testing.assert_array_equal(matrix.multiply(x[::-1].copy(), isa=isa, **form), alone[::-1])


def test_wrong_arguments_are_refused(isa: str) -> None:
    matrix = pack(encode(normal(3, 32), "q8_0"), "q8_0", (3, 32))
    with pytest.raises(ValueError, match="x: got 31 columns, expected 32"):
        matrix.multiply(normal(2, 31), isa=isa)
    with pytest.raises(ValueError, match="x: got dtype float64"):
        matrix.multiply(normal(2, 32).astype(np.float64), isa=isa)
    with pytest.raises(ValueError, match="x: expected a C-contiguous"):
        matrix.multiply(normal(32, 2).T, isa=isa)
    with pytest.raises(_core.DeviceError, match="available: scalar"):
        matrix.multiply(normal(2, 32), isa=isa + "0")
