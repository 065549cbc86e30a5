"""Limits of a rendering."""

from __future__ import annotations

import pytest
from jinja2 import TemplateError

from rapshee_engine.tokenizer.bounds import (
    MAX_TEXT,
    RenderBudget,
    require_number,
    require_size,
    text_size,
)


def test_the_budget_runs_out() -> None:
    with RenderBudget():
        RenderBudget.spend(1 << 28)
        with pytest.raises(TemplateError, match="too many steps"):
            RenderBudget.spend(1)
    with RenderBudget():
        RenderBudget.spend(1)


def test_sizes() -> None:
    with RenderBudget():
        require_size(MAX_TEXT)
        with pytest.raises(TemplateError, match="larger than"):
            require_size(MAX_TEXT + 1)


def test_numbers() -> None:
    require_number(999)
    require_number(-999)
    require_number("no number")
    for number in (1000, -1000):
        with pytest.raises(TemplateError, match="at most 999"):
            require_number(number)


def test_text_size_counts_what_a_value_holds() -> None:
    assert text_size("abc") == 4
    assert text_size({"ab": ["c", ("d", 1)]}) > 4
    assert text_size(None) == 1


def test_text_size_stops_counting() -> None:
    shared: list[object] = ["a" * 1000]
    for _ in range(100):
        shared = [shared, shared]
    assert MAX_TEXT < text_size(shared) < 2 * MAX_TEXT
