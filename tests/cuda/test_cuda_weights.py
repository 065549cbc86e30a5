"""How weights get to a CUDA device: packed on the host in slices, or made there by chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.cuda_weights import CHUNK_COLS, PackedWeight, pack, unpack_parts
from reference.linear import Blocks
from reference.quant import block_length, decode, encode, round_trip

FORMATS = {"f32": "half", "f16": "half", "bf16": "half", "q8_0": "q8", "q4_0": "q4z", "q4_1": "q4m"}
# Blocks that are taken apart first, with their bits a weight on the device.
TAKEN_APART = {
    "q5_0": ("q5m", 6),
    "q5_1": ("q5m", 6),
    "q2_k": ("q2m", 4),
    "q3_k": ("q3", 4),
    "q4_k": ("q4m", 5),
    "q5_k": ("q5m", 6),
    "q6_k": ("q6", 7),
}
HALVES = ["bf16", "f16"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def tensor(rows: int, cols: int, dtype: str) -> Bytes:
    random = np.random.default_rng((rows, cols))
    return np.frombuffer(encode(random.standard_normal((rows, cols)), dtype), np.uint8)


def expected(data: Bytes, dtype: str, rows: int, cols: int, half: str) -> tuple[Bytes, Bytes]:
    if FORMATS[dtype] == "half":
        packed = pack("half", half, decode(data.tobytes(), dtype, (rows, cols)))
    else:
        blocks = Blocks.parse(data.tobytes(), dtype, rows)
        packed = pack(FORMATS[dtype], half, blocks.codes, blocks.scales, blocks.minimums)
    return packed.codes, packed.scales


def assert_packed(data: Bytes, dtype: str, rows: int, cols: int, half: str, **options: int) -> None:
    weight = cuda_ops.PackedWeight(data, dtype, rows, cols, half=half, **options)
    assert weight.format == FORMATS[dtype]
    assert weight.shape == (rows, cols)
    codes, scales = weight.read()
    assert weight.nbytes == codes.nbytes + scales.nbytes
    want_codes, want_scales = expected(data, dtype, rows, cols, half)
    np.testing.assert_array_equal(codes, want_codes)
    np.testing.assert_array_equal(scales, want_scales)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_matrices(dtype: str, half: str) -> None:
    chunk = CHUNK_COLS[FORMATS[dtype]]
    for cols in (32, chunk - 32, chunk, chunk + 32, 576):
        for rows in (1, 7, 8, 9, 33):
            if cols > 0:
                assert_packed(tensor(rows, cols, dtype), dtype, rows, cols, half)


@pytest.mark.parametrize("dtype", TAKEN_APART)
def test_matrices_of_blocks_that_are_taken_apart(dtype: str) -> None:
    """Scales and minimums are rounded to fp16, which those of q5_0 and q5_1 are already."""
    format, bits = TAKEN_APART[dtype]
    rounding = 0 if dtype.startswith("q5_") and dtype != "q5_k" else 2.0**-11
    for rows, blocks in ((1, 1), (8, 3), (33, 5)):
        cols = blocks * block_length(dtype)
        data = tensor(rows, cols, dtype)
        for slice_bytes in (1, 1 << 20):
            weight = cuda_ops.PackedWeight(data, dtype, rows, cols, slice_bytes=slice_bytes)
            assert (weight.format, weight.shape) == (format, (rows, cols))
            packed = PackedWeight(format, "bf16", rows, cols, *weight.read())
            scaled, minimums = unpack_parts(packed)
            bound = rounding * (np.abs(scaled) + np.abs(minimums)) + 2.0**-24
            exact = decode(data.tobytes(), dtype, (rows, cols)).astype(np.float64)
            assert (np.abs(scaled + minimums - exact) <= bound).all()
        if rows % 8 == 0 and cols % 128 == 0:
            assert weight.nbytes * 8 == bits * rows * cols


@pytest.mark.parametrize("dtype", TAKEN_APART)
def test_codes_and_scales_lie_where_the_layout_says(dtype: str) -> None:
    """Random bytes: every code occurs in every place, and scales of both signs."""
    format, _ = TAKEN_APART[dtype]
    rows, cols = 9, 2 * block_length(dtype)
    data = np.random.default_rng(5).integers(0, 60, len(tensor(rows, cols, dtype))).astype(np.uint8)
    packed = PackedWeight(
        format, "bf16", rows, cols, *cuda_ops.PackedWeight(data, dtype, rows, cols).read()
    )
    scaled, minimums = unpack_parts(packed)
    exact = decode(data.tobytes(), dtype, (rows, cols)).astype(np.float64)
    bound = 2.0**-11 * (np.abs(scaled) + np.abs(minimums)) + 2.0**-24
    assert (np.abs(scaled + minimums - exact) <= bound).all()


def test_scales_beyond_the_range_are_refused() -> None:
    block = np.zeros(210, np.uint8)
    block[192:208] = 127
    block[208:210] = np.array([1000], "<f2").view(np.uint8)
    with pytest.raises(cuda_ops.WeightError, match="the scale 127000 of row 0 is beyond the range"):
        cuda_ops.PackedWeight(block, "q6_k", 1, 256)


@pytest.mark.parametrize("cols", [8, 24, 40, 136])
def test_halves_need_eight_columns_alone(cols: int) -> None:
    assert_packed(tensor(9, cols, "f32"), "f32", 9, cols, "f16")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("slice_bytes", [1, 20_000, 1 << 20])
@pytest.mark.parametrize("dtype", ["f32", "q8_0", "q4_1"])
def test_slices(dtype: str, slice_bytes: int, threads: int) -> None:
    """From a panel a slice to all of them, with tasks that do not fill the last one."""
    data = tensor(203, 192, dtype)
    assert_packed(data, dtype, 203, 192, "bf16", slice_bytes=slice_bytes, threads=threads)


def test_halves_of_the_same_type_keep_their_bits() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for dtype in HALVES:
        weight = cuda_ops.PackedWeight(bits.view(np.uint8), dtype, 256, 256, half=dtype)
        codes, _ = weight.read()
        assert set(codes.view(np.uint16).reshape(-1)) == set(bits)


@pytest.mark.parametrize(
    ("value", "dtype", "half", "message"),
    [
        (65520.0, "f32", "f16", r"the value 65520 of row 3, column 5 is beyond the range of f16"),
        (-1e6, "bf16", "f16", r"beyond the range of f16; use bf16"),
        (3.4e38, "f32", "bf16", r"beyond the range of bf16'"),
    ],
)
def test_values_beyond_the_range_are_refused(
    value: float, dtype: str, half: str, message: str
) -> None:
    matrix = np.zeros((9, 16), np.float32)
    matrix[3, 5] = value
    data = np.frombuffer(encode(matrix, dtype), np.uint8)
    before = cuda_ops.free_memory()
    with pytest.raises(cuda_ops.WeightError, match=message) as error:
        cuda_ops.PackedWeight(data, dtype, 9, 16, half=half)
    assert error.value.args[1] == "test.weight"
    assert cuda_ops.free_memory() == before


def plain_codes(matrix: npt.ArrayLike, half: str) -> Bytes:
    """u8 [panels, 8, bytes of a row]: rows as they are, then zeros up to a whole panel."""
    values = round_trip(np.asarray(matrix), half)
    if half == "f16":
        bits = values.astype("<f2").view(np.uint16)
    else:
        bits = (values.view(np.uint32) >> np.uint32(16)).astype("<u2")
    padded = np.pad(bits, ((0, -len(bits) % 8), (0, 0)))
    return np.ascontiguousarray(padded).view(np.uint8).reshape(-1, 8, 2 * bits.shape[1])


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_plain_matrices(dtype: str, half: str) -> None:
    for rows, cols in ((1, 8), (7, 24), (8, 32), (203, 40)):
        data = tensor(rows, cols, dtype)
        want = plain_codes(decode(data.tobytes(), dtype, (rows, cols)), half)
        for slice_bytes in (1, 2000, 1 << 20):
            weight = cuda_ops.PackedWeight(
                data, dtype, rows, cols, half=half, slice_bytes=slice_bytes, plain=True
            )
            assert (weight.format, weight.shape) == ("plain", (rows, cols))
            codes, scales = weight.read()
            np.testing.assert_array_equal(codes, want)
            assert weight.nbytes == codes.nbytes
            assert scales.size == 0


def test_low_bit_matrices_are_never_plain() -> None:
    data = tensor(9, 64, "q8_0")
    weight = cuda_ops.PackedWeight(data, "q8_0", 9, 64, plain=True)
    assert weight.format == "q8"


def test_values_at_the_end_of_the_range_are_taken() -> None:
    matrix = np.zeros((1, 8), np.float32)
    matrix[0, :5] = 65519, -65519, np.inf, -np.inf, np.nan
    data = matrix.view(np.uint8).reshape(-1)
    assert_packed(data, "f32", 1, 8, "f16")


@pytest.mark.parametrize(
    ("dtype", "rows", "cols", "message"),
    [
        ("f32", 2, 12, "rows of 12 elements: CUDA kernels take multiples of 8"),
        ("f32", 2, 0, "rows of 0 elements"),
        ("q8_0", 2, 40, "rows of 40 elements do not divide into q8_0 blocks"),
        ("f32", 0, 8, "0 rows, expected 1 to"),
        ("q6_k", 2, 128, "rows of 128 elements do not divide into q6_k blocks"),
    ],
)
def test_shapes_that_no_kernel_takes_are_refused(
    dtype: str, rows: int, cols: int, message: str
) -> None:
    with pytest.raises(cuda_ops.WeightError, match=message) as error:
        cuda_ops.PackedWeight(np.zeros(1000, np.uint8), dtype, rows, cols)
    assert error.value.args[1] == "test.weight"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_load_that_fails_leaves_nothing_behind(threads: int) -> None:
    data = tensor(203, 192, "q8_0")
    before = cuda_ops.free_memory()
    with pytest.raises(cuda_ops.WeightError, match=r"rows .* end at byte"):
        cuda_ops.PackedWeight(data[:-1], "q8_0", 203, 192, slice_bytes=20_000, threads=threads)
    assert cuda_ops.free_memory() == before
    assert_packed(data, "q8_0", 203, 192, "bf16")
    assert cuda_ops.free_memory() == before


def test_vectors_become_floats() -> None:
    for dtype in FORMATS:
        data = tensor(1, 96, dtype)
        got = cuda_ops.read_vector(data, dtype, 96)
        np.testing.assert_array_equal(got, decode(data.tobytes(), dtype, (96,)))
    assert cuda_ops.read_vector(np.zeros(4, np.uint8), "f32", 1) == [0.0]
    for dtype, cols in (("f32", 0), ("q8_0", 33)):
        with pytest.raises(cuda_ops.WeightError, match="got 1 x"):
            cuda_ops.read_vector(np.zeros(100, np.uint8), dtype, cols)


def random_weights(key: int, rows: int, cols: int) -> Floats:
    """``model/random_weights.h``: SplitMix64 of key and index, uniform, with variance 1 / cols."""
    with np.errstate(over="ignore"):
        index = np.arange(rows * cols, dtype=np.uint64)
        z = np.uint64(key) + index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    uniform = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (np.sqrt(np.float32(3) / np.float32(cols)) * uniform).reshape(rows, cols)


@pytest.mark.parametrize("half", HALVES)
def test_random_halves_are_those_of_every_device(half: str) -> None:
    for rows, cols in ((1, 8), (9, 40), (33, 96)):
        weight = cuda_ops.PackedWeight.random(1 << 60, "bf16", rows, cols, half=half)
        want = pack("half", half, random_weights(1 << 60, rows, cols))
        np.testing.assert_array_equal(weight.read()[0], want.codes)
        plain = cuda_ops.PackedWeight.random(1 << 60, "bf16", rows, cols, half=half, plain=True)
        want_codes = plain_codes(random_weights(1 << 60, rows, cols), half)
        np.testing.assert_array_equal(plain.read()[0], want_codes)


def test_a_device_without_room_says_so() -> None:
    before = cuda_ops.free_memory()
    rows = before // (8 * 2) + 8
    with pytest.raises(cuda_ops.DeviceError, match="out of memory"):
        cuda_ops.PackedWeight.random(1, "f32", rows, 8)
    assert cuda_ops.free_memory() == before


def test_halves_are_rounded_to_nearest_even() -> None:
    ties = (np.float32(1) + np.arange(8, dtype=np.float32) * np.float32(2.0**-8)).reshape(1, 8)
    weight = cuda_ops.PackedWeight(ties.view(np.uint8).reshape(-1), "f32", 1, 8)
    want = pack("half", "bf16", round_trip(ties, "bf16"))
    np.testing.assert_array_equal(weight.read()[0], want.codes)
