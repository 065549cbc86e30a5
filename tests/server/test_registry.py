"""Names, engines, and the bound on what waits."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from rapshee_engine.server.errors import ApiError
from rapshee_engine.server.registry import EngineRegistry, EngineSlot


def test_two_names_share_an_engine_and_its_bound(engine: Any) -> None:
    registry = EngineRegistry({"a": engine, "b": engine}, created=1, max_pending=2)
    assert registry.get("a").slot is registry.get("b").slot
    assert [model.name for model in registry] == ["a", "b"]
    assert registry.get("b").created == 1


def test_an_unknown_name_lists_the_known_ones(engine: Any) -> None:
    registry = EngineRegistry({"a": engine}, created=1, max_pending=2)
    with pytest.raises(ApiError, match="available: a") as caught:
        registry.get("x" * 1000)
    assert caught.value.status == 404
    assert len(caught.value.message) < 300


def test_an_engine_with_two_names_is_one(engine: Any) -> None:
    other = object()
    engines = {"a": engine, "b": engine, "c": other}
    registry = EngineRegistry(engines, created=1, max_pending=2)  # type: ignore[arg-type]
    assert list(registry.engines()) == [("a", engine), ("c", other)]


def test_not_ready_names_the_models(engine: Any) -> None:
    registry = EngineRegistry({"a": engine}, created=1, max_pending=2)
    assert registry.not_ready() == []
    engine.is_ready = False
    assert registry.not_ready() == ["a"]


def test_room_is_bounded_and_given_back(engine: Any) -> None:
    slot = EngineSlot(engine, max_pending=3)
    with ExitStack() as stack:
        stack.enter_context(slot.admit(1))
        stack.enter_context(slot.admit(2))
        with pytest.raises(ApiError) as caught, slot.admit(1):
            pass
        assert caught.value.status == 503
    with slot.admit(3), pytest.raises(ApiError), slot.admit(1):
        pass


def test_an_idle_engine_takes_any_request(engine: Any) -> None:
    slot = EngineSlot(engine, max_pending=3)
    with slot.admit(128), pytest.raises(ApiError), slot.admit(1):
        pass
