"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rapshee_engine.pull import DEFAULT_MODEL, cache_folder, pull


@pytest.fixture(scope="session")
def default_model() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), fetched into the user's cache folder like any first start."""
    return pull(DEFAULT_MODEL, cache_folder(os.environ))
