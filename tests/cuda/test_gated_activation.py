"""Gated activations of products that are there already: out = act(gate) * up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _cuda_ops as cuda_ops
from reference.norm import silu_mul

HALF_UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}  # of 8 and 11 bits
# Of floats: the exponent's relative error is an absolute one of its argument, at most twice 100.
FLOAT_ERROR = 16 * 2.0**-24
SMALLEST = {"bf16": 2.0**-126, "f16": 2.0**-25}  # float's smallest normal, half the smallest f16

Floats = npt.NDArray[np.float32]


def gelu_mul(gate: Floats, up: Floats) -> npt.NDArray[np.float64]:
    v = gate.astype(np.float64)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))
    return 0.5 * v * (1 + tanh) * up


EXPECTED = {"silu": silu_mul, "gelu_tanh": gelu_mul}


def values(rows: int, size: int) -> Floats:
    random = np.random.default_rng(1000 * rows + size)
    return (4 * random.standard_normal((rows, 2 * size))).astype(np.float32)


def check(gate_up: Floats, activation: str, half: str) -> None:
    gate, up = np.split(gate_up, 2, axis=1)
    expected = EXPECTED[activation](gate, up)
    out = cuda_ops.gated_activation(gate_up, activation=activation, half=half)
    # gelu's argument grows with the cube; the oracle itself loses 2^-53 of `gate` to its tanh.
    argument = (
        np.abs(gate) if activation == "silu" else np.abs(gate) + np.abs(gate.astype("f8")) ** 3
    )
    relative = HALF_UNIT[half] + FLOAT_ERROR * (1 + argument)
    bound = relative * np.abs(expected) + SMALLEST[half] + 2.0**-52 * np.abs(gate * up)
    excess = np.abs(out - expected) - bound
    assert (excess <= 0).all(), f"off by {excess.max()} more than allowed"


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [4, 1020, 1024, 1028, 3072])
def test_sizes(size: int, activation: str, half: str) -> None:
    check(values(2, size), activation, half)


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_rows(rows: int) -> None:
    check(values(rows, 64), "silu", "bf16")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_far_from_zero(activation: str) -> None:
    gate = np.linspace(-120, 120, 964, dtype=np.float32)
    gate[:4] = 0.0, -0.0, 1e-30, -1e-30
    check(np.stack([gate, np.full_like(gate, 1.5)]).reshape(1, -1), activation, "bf16")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_huge_gates_are_kept_or_closed(activation: str) -> None:
    gate_up = np.array([[1e30, -1e30, 500, -500, 1, 1, 1, 1]], np.float32)
    out = cuda_ops.gated_activation(gate_up, activation=activation)
    np.testing.assert_allclose(out, [[1e30, 0, 500, 0]], rtol=2.0**-8)


def test_what_is_not_a_number_stays_in_its_place() -> None:
    gate_up = values(3, 8)
    expected = cuda_ops.gated_activation(gate_up, activation="silu")
    gate_up[0, 3] = gate_up[2, 9] = np.nan
    expected[0, 3] = expected[2, 1] = np.nan
    out = cuda_ops.gated_activation(gate_up, activation="silu")
    np.testing.assert_array_equal(out, expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    gate_up = values(4, 1028)
    out = cuda_ops.gated_activation(gate_up, activation="gelu_tanh")
    for row in range(4):
        alone = cuda_ops.gated_activation(gate_up[row : row + 1], activation="gelu_tanh")
        np.testing.assert_array_equal(alone[0], out[row])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    out = cuda_ops.gated_activation(np.zeros(shape, np.float32), activation="silu")
    assert out.shape == (shape[0], shape[1] // 2)


def test_repeats_are_timed() -> None:
    gate_up = values(2, 8)
    out, times = cuda_ops.gated_activation(gate_up, activation="silu", repeats=2)
    assert times.shape == (2,)
    np.testing.assert_array_equal(out, cuda_ops.gated_activation(gate_up, activation="silu"))


@pytest.mark.parametrize(
    ("columns", "activation", "half", "message"),
    [
        (7, "silu", "bf16", "gate_up: got 7 columns, expected an even number"),
        (12, "silu", "bf16", "gated activation: got a size of 6, expected a multiple of 4"),
        (8, "relu", "bf16", "activation: got 'relu', expected silu or gelu_tanh"),
        (8, "silu", "f32", "half: got 'f32', expected bf16 or f16"),
    ],
)
def test_wrong_arguments_are_refused(
    columns: int, activation: str, half: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cuda_ops.gated_activation(
            np.zeros((2, columns), np.float32), activation=activation, half=half
        )
