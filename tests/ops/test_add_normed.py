from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from reference.norm import rms_norm

pytestmark = pytest.mark.parametrize("isa", _core.build_info()["isas"])

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 100, 576]


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1.0, 0.22])
def test_adds_the_normalised_rows(isa: str, size: int, n: int, factor: float) -> None:
    x, y, weight = normal(n, size), normal(n, size, seed=1) * 3, normal(size, seed=2)
    actual = _core.op_add_normed(x, y, weight, 1e-5, factor, isa=isa)
    expected = x + factor * rms_norm(y, weight, 1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=3e-6)


def test_rows_do_not_depend_on_each_other(isa: str) -> None:
    x, y, weight = normal(9, 100), normal(9, 100, seed=1), normal(100, seed=2)
    together = _core.op_add_normed(x, y, weight, 1e-5, 0.5, isa=isa)
    for i in range(len(x)):
        row = slice(i, i + 1)
        alone = _core.op_add_normed(x[row], y[row], weight, 1e-5, 0.5, isa=isa)
        np.testing.assert_array_equal(together[row], alone)


def test_wrong_arguments_are_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="weight: got 3, expected 4"):
        _core.op_add_normed(normal(2, 4), normal(2, 4), normal(3), 1e-5, 1.0, isa=isa)
    with pytest.raises(ValueError, match=r"y: expected \[2, 4\]"):
        _core.op_add_normed(normal(2, 4), normal(1, 4), normal(4), 1e-5, 1.0, isa=isa)
