"""Random weights that are made on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.cuda_weights import CHUNK_COLS, PackedWeight, num_scales, pack, unpack
from reference.quant import round_trip

SEED = 0x9E3779B97F4A7C15  # large: sums of the generator wrap
SHAPES = [(1, 8), (7, 64), (8, 128), (9, 136), (17, 40), (16, 1024)]


def fill(format: str, half: str, rows: int, cols: int, seed: int = SEED) -> PackedWeight:
    weight = cuda_ops.Weight(format, half, rows, cols)
    weight.fill_random(seed)
    codes, scales = weight.read()
    panels, chunks = -(-rows // 8), -(-cols // CHUNK_COLS[format])
    shape = (panels, chunks, -1)
    return PackedWeight(format, half, rows, cols, codes.reshape(shape), scales.reshape(shape))


def random_bits(rows: int, cols: int, seed: int = SEED) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function of seed + index * its increment."""
    mask = (1 << 64) - 1

    def bits(index: int) -> int:
        z = (seed + index * 0x9E3779B97F4A7C15) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    return np.array([bits(i) for i in range(rows * cols)], np.uint64).reshape(rows, cols)


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_halves_are_uniform_numbers_of_their_index(rows: int, cols: int, half: str) -> None:
    uniform = (random_bits(rows, cols) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23)
    values = np.sqrt(np.float32(3) / np.float32(cols)) * (uniform - np.float32(1))
    weight = fill("half", half, rows, cols)
    np.testing.assert_array_equal(unpack(weight), round_trip(values, half))
    np.testing.assert_array_equal(weight.codes, pack("half", half, values).codes)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("format", ["q8", "q4z", "q4m"])
def test_codes_are_the_highest_bits(format: str, rows: int, cols: int) -> None:
    weight = fill(format, "bf16", rows, cols)
    bits = random_bits(rows, cols)
    if format == "q8":
        codes = (bits >> np.uint64(56)).astype(np.uint8).view(np.int8).astype(np.int64)
        scale = np.sqrt(12 / cols) / 256
    else:
        codes = (bits >> np.uint64(60)).astype(np.int64) - (8 if format == "q4z" else 0)
        scale = np.sqrt(12 / cols) / 16
    scales = np.full((rows, num_scales(cols, format)), scale)
    expected = pack(format, "bf16", codes, scales, -7.5 * scales if format == "q4m" else None)
    np.testing.assert_array_equal(weight.codes, expected.codes)
    # Scales are rounded to fp16, after some roundings to float.
    np.testing.assert_allclose(unpack(weight), unpack(expected), rtol=0, atol=2.0**-8 * 16 * scale)


@pytest.mark.parametrize("format", ["half", "q8", "q4z", "q4m"])
def test_variance_is_one_over_the_columns(format: str) -> None:
    values = unpack(fill(format, "bf16", 16, 1024))
    assert abs(values.var() * 1024 - 1) < 0.05
    # Codes of 4 bits with the zero 8 lie half a step, 0.11 deviations, below it.
    assert abs(values.mean()) < 0.13 / np.sqrt(1024)


@pytest.mark.parametrize("format", ["q2m", "q3", "q5m", "q6"])
def test_planes_hold_random_codes(format: str) -> None:
    weight = fill(format, "bf16", 13, 1024)
    values = unpack(weight)
    # Codes of two bits have 15/16 of a uniform distribution's variance, and those of three with the
    # zero 4 lie half a step, 0.22 deviations, below it.
    assert abs(values.var() * 1024 - 1) < 0.1
    assert abs(values.mean()) < 0.25 / np.sqrt(1024)
    assert len(np.unique(values)) == {"q2m": 4, "q3": 8, "q5m": 32, "q6": 64}[format]
    assert (weight.scales.reshape(2, 8, 8, -1)[1, :, 5:] == 0).all()


@pytest.mark.parametrize("format", ["half", "q8", "q4z", "q4m"])
def test_missing_rows_and_columns_are_zeros(format: str) -> None:
    weight = fill(format, "bf16", 3, CHUNK_COLS[format] + 8)
    lanes = weight.codes.reshape(2, 8, 4, 2, 8)  # chunk, row, t, half of the 16 bytes
    assert (lanes[:, :3].any(axis=-1)[0]).all()
    assert (lanes[:, 3:] == 0).all()
    assert (lanes[1, :, :, 1] == 0).all()
    scales = weight.scales.reshape(2, 8, -1)
    assert (scales[:, :3] != 0).any() == (format != "half")
    assert (scales[:, 3:] == 0).all()


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (fill("half", "bf16", 8, 64, seed).codes for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(("rows", "cols"), [(0, 64), (8, 0)])
def test_nothing(rows: int, cols: int) -> None:
    weight = cuda_ops.Weight("q8", "bf16", rows, cols)
    weight.fill_random(1)
    assert all(part.size == 0 for part in weight.read())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q5", "bf16", 8, 8), "format: got 'q5', expected half, q8, q4z"),
        (("half", "f32", 8, 8), "half: got 'f32', expected bf16 or f16"),
        (("half", "bf16", -1, 8), "weight: got"),
    ],
)
def test_wrong_weights_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuda_ops.Weight(*arguments)


def test_bytes_that_do_not_fit_are_refused() -> None:
    weight = cuda_ops.Weight("half", "bf16", 8, 32)
    with pytest.raises(ValueError, match="codes: got 511 bytes, expected 512"):
        weight.write(np.zeros(511, np.uint8), np.zeros(0, np.uint8))
