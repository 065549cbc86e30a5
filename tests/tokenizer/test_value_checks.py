"""Checks at their borders; what they stop inside templates is tested with the sandbox."""

from __future__ import annotations

import pytest
from jinja2 import TemplateError

from rapshee_engine.tokenizer.bounds import MAX_TEXT, RenderBudget
from rapshee_engine.tokenizer.value_checks import (
    FILTER_CHECKS,
    STR_METHOD_CHECKS,
    check_format,
    check_power,
    check_product,
    check_remainder,
    check_sum,
    check_time_format,
)


@pytest.fixture(autouse=True)
def budget() -> object:
    with RenderBudget():
        yield


def test_products() -> None:
    check_product("a", MAX_TEXT)
    check_product(MAX_TEXT, [0])
    check_product("a", -1)
    check_product(1 << 500, 1 << 500)
    check_product(1.5, 1e300)
    for left, right in (("ab", MAX_TEXT), (MAX_TEXT, [0, 1]), (1 << 600, 1 << 600)):
        with pytest.raises(TemplateError, match="larger than"):
            check_product(left, right)


def test_powers() -> None:
    check_power(2, 500)
    check_power(10, -3)
    check_power(2.0, 0.5)
    for base, exponent in ((2, 1000), (1 << 600, 2)):
        with pytest.raises(TemplateError, match="larger than"):
            check_power(base, exponent)
    with pytest.raises(TemplateError, match="takes numbers"):
        check_power("a", 2)


def test_sums() -> None:
    check_sum(1 << 2000, 1)
    check_sum("a" * (MAX_TEXT - 1), "b")
    with pytest.raises(TemplateError, match="larger than"):
        check_sum("a" * MAX_TEXT, "b")


def test_formats() -> None:
    check_remainder(10**9, 7)
    check_remainder("%5d %-10.3f %% %(name)s 100000", {"name": 1})
    check_format("{} {0:>10} {{100000}} 100000: {x!r:.3}", ((1,), {}))
    check_time_format("%d %B %Y 100000")
    for pattern in ("%1000d", "%.1000f", "%*d"):
        with pytest.raises(TemplateError, match="width"):
            check_remainder(pattern, 1)
        with pytest.raises(TemplateError, match="width"):
            check_time_format(pattern)
    for pattern in ("{:1000}", "{:.1000f}", "{:{}}"):
        with pytest.raises(TemplateError, match="width"):
            check_format(pattern, (1, 2))


def test_text_methods() -> None:
    STR_METHOD_CHECKS["ljust"]("a", 999, ".")
    STR_METHOD_CHECKS["replace"]("a" * 1000, "a", "b" * 1000, 1)
    STR_METHOD_CHECKS["join"](", ", ["a", "b"])
    with pytest.raises(TemplateError, match="larger than"):
        STR_METHOD_CHECKS["join"]("a" * 3000, ["b"] * 3000)
    with pytest.raises(TemplateError, match="larger than"):
        STR_METHOD_CHECKS["expandtabs"]("\t" * 5000, 999)


def test_filters() -> None:
    FILTER_CHECKS["indent"]("a\nb", width=4)
    FILTER_CHECKS["indent"]("a\nb", "  ")
    FILTER_CHECKS["tojson"]({"a": [1]}, indent=4)
    FILTER_CHECKS["round"](1.5, 2, "floor")
    FILTER_CHECKS["join"](iter(["a"]), ", ")
    with pytest.raises(TemplateError, match="larger than"):
        FILTER_CHECKS["indent"]("\n" * 5000, 999)
