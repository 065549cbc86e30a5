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
def test_rows_have_unit_mean_square_times_weight(isa: str, size: int, n: int) -> None:
    x, weight = normal(n, size) * 3, normal(size, seed=1)
    actual = _core.op_rms_norm(x, weight, 1e-5, isa=isa)
    np.testing.assert_allclose(actual, rms_norm(x, weight, 1e-5), rtol=2e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_small_and_large_rows(isa: str, scale: float, eps: float) -> None:
    x, weight = normal(2, 65) * np.float32(scale), normal(65, seed=1)
    actual = _core.op_rms_norm(x, weight, eps, isa=isa)
    np.testing.assert_allclose(actual, rms_norm(x, weight, eps), rtol=2e-6)


def test_zeros_stay_zeros(isa: str) -> None:
    actual = _core.op_rms_norm(np.zeros((2, 40), np.float32), normal(40), 1e-6, isa=isa)
    assert (actual == 0.0).all()


def test_rows_do_not_depend_on_each_other(isa: str) -> None:
    x, weight = normal(9, 576), normal(576, seed=1)
    together = _core.op_rms_norm(x, weight, 1e-5, isa=isa)
    for i in range(len(x)):
        alone = _core.op_rms_norm(x[i : i + 1], weight, 1e-5, isa=isa)
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_wrong_arguments_are_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="weight: got 3, expected 4"):
        _core.op_rms_norm(normal(2, 4), normal(3), 1e-5, isa=isa)
    with pytest.raises(ValueError, match="x: got 1 dimensions"):
        _core.op_rms_norm(normal(4), normal(4), 1e-5, isa=isa)
