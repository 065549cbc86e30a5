"""The encodings of the oracle against bytes and bounds worked out by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from reference.quant import DTYPES, LOW_BIT, block_length, decode, encode, round_trip

GOLDEN = Path(__file__).parent.parent / "golden" / "quant_blocks.npz"


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def test_q4_0_block_layout() -> None:
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    values = decode(half(0.5) + nibbles, "q4_0", (32,))
    expected = [(q - 8) * 0.5 for q in [*range(16), *range(15, -1, -1)]]
    np.testing.assert_array_equal(values, np.float32(expected))


def test_q4_1_block_layout() -> None:
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    values = decode(half(0.5) + half(-3.0) + nibbles, "q4_1", (32,))
    expected = [q * 0.5 - 3 for q in [*range(16), *range(15, -1, -1)]]
    np.testing.assert_array_equal(values, np.float32(expected))


def test_q8_0_block_layout() -> None:
    quants = list(range(-16, 16))
    values = decode(half(0.25) + struct.pack("<32b", *quants), "q8_0", (32,))
    np.testing.assert_array_equal(values, np.float32(quants) * np.float32(0.25))


@pytest.mark.parametrize("dtype", LOW_BIT)
def test_blocks_are_read_as_ggml_reads_them(dtype: str) -> None:
    golden = np.load(GOLDEN)
    values = golden[f"{dtype}_values"]
    actual = decode(golden[dtype].tobytes(), dtype, values.shape)
    np.testing.assert_array_equal(actual, values)


def test_bf16_rounds_to_nearest_even() -> None:
    halfway_down, halfway_up, above = 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-12
    values = round_trip(np.float32([1.0, halfway_down, halfway_up, above, -0.0]), "bf16")
    expected = np.float32([1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -0.0])
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("dtype", "steps"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)]
)
def test_round_trip_error_is_bounded(dtype: str, steps: float) -> None:
    values = np.random.RandomState(0).uniform(-1, 1, (8, 64)).astype(np.float32)
    assert np.abs(round_trip(values, dtype) - values).max() <= steps


@pytest.mark.parametrize(
    ("dtype", "levels"),
    [
        ("q4_0", 8), ("q4_1", 7.5), ("q5_0", 16), ("q5_1", 15.5), ("q2_k", 1.25), ("q3_k", 3.5),
        ("q4_k", 7), ("q5_k", 14), ("q6_k", 30),
    ],
)  # fmt: skip
def test_low_bits_are_within_one_level(dtype: str, levels: float) -> None:
    values = np.random.RandomState(1).uniform(-1, 1, (8, 256)).astype(np.float32)
    assert np.abs(round_trip(values, dtype) - values).max() <= 1 / levels + 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(dtype: str) -> None:
    zeros = np.zeros((2, 256), dtype=np.float32)
    np.testing.assert_array_equal(round_trip(zeros, dtype), zeros)
    blocks = zeros.size // block_length(dtype)
    sizes = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "f32": 4}
    sizes |= {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}
    assert len(encode(zeros, dtype)) == blocks * sizes.get(dtype, 2)
