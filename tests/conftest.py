"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from rapshee_engine.cache import cache_folder
from rapshee_engine.pull import DEFAULT_MODEL, pull
from reference.devices import TEST_DEVICES, TEST_KERNELS

# No test measures time, on however slow or busy a machine it runs.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), fetched into the user's cache folder like any first start."""
    return pull(DEFAULT_MODEL, cache_folder(os.environ))


@pytest.fixture(scope="session", params=TEST_DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that is tested."""
    return str(request.param)


@pytest.fixture(params=TEST_KERNELS, ids="-".join)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each device that is tested, the CPU with each of its instruction sets."""
    device, isa = request.param
    if isa:
        monkeypatch.setenv("RAPSHEE_CPU_ISA", isa)
    return str(device)
