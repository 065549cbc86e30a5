from __future__ import annotations

from pathlib import Path

import pytest

from rapshee_engine.cache import cache_folder


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/ada")
    assert cache_folder({}) == Path("/users/ada/.cache/rapshee-engine")
    assert cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/rapshee-engine")
    assert cache_folder({"XDG_CACHE_HOME": "/c", "RAPSHEE_CACHE": "/x"}) == Path("/x")
