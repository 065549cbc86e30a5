from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from reference.rope import rotate

pytestmark = pytest.mark.parametrize("isa", _core.build_info()["isas"])

Floats = npt.NDArray[np.float32]


def angles(half: int) -> tuple[Floats, Floats]:
    angle = np.random.default_rng(half).uniform(-100, 100, half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def heads(n: int, dim: int) -> Floats:
    return np.random.default_rng(dim).standard_normal((n, dim)).astype(np.float32)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("dim", [2, 8, 16, 30, 32, 34, 64, 80, 128])
def test_halves_rotate(isa: str, dim: int, n: int) -> None:
    x, (cos, sin) = heads(n, dim), angles(dim // 2)
    actual = _core.op_rope(x, cos, sin, isa=isa)
    np.testing.assert_allclose(actual, rotate(x, cos, sin), atol=1e-6)


@pytest.mark.parametrize("half", [0, 1, 15, 16, 17, 31])
def test_dimensions_beyond_the_rotated_ones_stay(isa: str, half: int) -> None:
    x, (cos, sin) = heads(3, 64), angles(half)
    actual = _core.op_rope(x, cos, sin, isa=isa)
    np.testing.assert_array_equal(actual[:, 2 * half :], x[:, 2 * half :])
    np.testing.assert_allclose(actual, rotate(x, cos, sin), atol=1e-6)


def test_the_angle_zero_changes_nothing(isa: str) -> None:
    x = heads(2, 80)
    cos, sin = np.ones(40, np.float32), np.zeros(40, np.float32)
    np.testing.assert_array_equal(_core.op_rope(x, cos, sin, isa=isa), x)


def test_wrong_arguments_are_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="cos: got 5 angles for heads of 8"):
        _core.op_rope(heads(1, 8), *angles(5), isa=isa)
