from __future__ import annotations

import numpy as np
import pytest

from rapshee_engine import _core
from reference.norm import gelu_mul

pytestmark = pytest.mark.parametrize("isa", _core.build_info()["isas"])


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 33, 96, 1536])
def test_matches_the_formula(isa: str, size: int) -> None:
    random = np.random.default_rng(size)
    gate, up = (random.standard_normal(size).astype(np.float32) for _ in range(2))
    actual = _core.op_gelu_mul(gate, up, isa=isa)
    np.testing.assert_allclose(actual, gelu_mul(gate, up), rtol=4e-6)


def test_over_the_whole_range(isa: str) -> None:
    gate = np.linspace(-30.0, 30.0, 4001).astype(np.float32)
    actual = _core.op_gelu_mul(gate, np.ones_like(gate), isa=isa)
    # The exponent's rounding is a relative error: it counts where almost nothing is left.
    np.testing.assert_allclose(actual, gelu_mul(gate, np.ones_like(gate)), rtol=2e-6, atol=1e-8)


def test_saturates_without_overflow(isa: str) -> None:
    gate = np.array([-1e30, -1000.0, 0.0, 1000.0, 1e30], np.float32)
    actual = _core.op_gelu_mul(gate, np.ones_like(gate), isa=isa)
    np.testing.assert_array_equal(actual[2:], gate[2:])
    assert (np.abs(actual[:2]) < 1e-8).all()


def test_not_a_number_stays_one(isa: str) -> None:
    nan, one = np.full(1, np.nan, np.float32), np.ones(1, np.float32)
    assert np.isnan(_core.op_gelu_mul(one, nan, isa=isa)).all()
    assert np.isnan(_core.op_gelu_mul(nan, one, isa=isa)).all()


def test_an_element_does_not_depend_on_its_place(isa: str) -> None:
    values = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    whole = _core.op_gelu_mul(values, values, isa=isa)
    for begin in range(1, 18):
        part = values[begin:].copy()
        np.testing.assert_array_equal(_core.op_gelu_mul(part, part, isa=isa), whole[begin:])


def test_wrong_arguments_are_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="up: got 2, expected 3"):
        _core.op_gelu_mul(np.zeros(3, np.float32), np.zeros(2, np.float32), isa=isa)
