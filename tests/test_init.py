"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rapshee_engine


@pytest.mark.parametrize("name", rapshee_engine.__all__)
def test_public_names_are_there_and_listed(name: str) -> None:
    assert getattr(rapshee_engine, name) is getattr(rapshee_engine, name)
    assert name in dir(rapshee_engine)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'rapshee_engine' has no attribute 'Llm'"):
        getattr(rapshee_engine, "Llm")  # noqa: B009


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import rapshee_engine", "numpy"),
        ("from rapshee_engine import SamplingParams", "numpy"),
        ("from rapshee_engine import LLM", "asyncio"),
    ],
)
def test_a_name_loads_only_what_it_needs(statement: str, absent: str) -> None:
    program = f"{statement}; import sys; sys.exit({absent!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
