from __future__ import annotations

import numpy as np
import pytest

from rapshee_engine import _core
from reference.norm import soft_cap

pytestmark = pytest.mark.parametrize("isa", _core.build_info()["isas"])


@pytest.mark.parametrize("cap", [0.0, 0.5, 30.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 256])
def test_matches_the_formula(isa: str, size: int, scale: float, cap: float) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32) * 40
    actual = _core.op_soft_cap(x, scale, cap, isa=isa)
    np.testing.assert_allclose(actual, soft_cap(x, scale, cap), rtol=4e-7)


def test_over_the_whole_range(isa: str) -> None:
    tiny = 10.0 ** np.arange(-30, 0)
    x = np.concatenate([np.linspace(-12.0, 12.0, 4001), tiny, -tiny]).astype(np.float32)
    actual = _core.op_soft_cap(x, 1.0, 1.0, isa=isa)
    np.testing.assert_allclose(actual, np.tanh(x.astype(np.float64)), rtol=4e-7)


def test_never_exceeds_the_cap(isa: str) -> None:
    x = np.array([-np.inf, -1e30, -1e4, 1e4, 1e30, np.inf], np.float32)
    actual = _core.op_soft_cap(x, 1.0, 30.0, isa=isa)
    np.testing.assert_array_equal(actual, np.sign(x) * 30)


def test_not_a_number_stays_one(isa: str) -> None:
    nan = np.full(3, np.nan, np.float32)
    assert np.isnan(_core.op_soft_cap(nan, 1.0, 30.0, isa=isa)).all()
    assert np.isnan(_core.op_soft_cap(nan, 0.5, 0.0, isa=isa)).all()


def test_an_element_does_not_depend_on_its_place(isa: str) -> None:
    values = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    whole = _core.op_soft_cap(values, 3.0, 2.0, isa=isa)
    for begin in range(1, 18):
        part = _core.op_soft_cap(values[begin:].copy(), 3.0, 2.0, isa=isa)
        np.testing.assert_array_equal(part, whole[begin:])
