"""Rapshee Engine: LLM inference without torch, embedded or behind an OpenAI-compatible server."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rapshee_engine._core import __version__
    from rapshee_engine.engine.async_engine import AsyncEngine
    from rapshee_engine.llm import LLM
    from rapshee_engine.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncEngine", "SamplingParams", "__version__"]

# Public name -> the module that has it, loaded when the name is first asked for: whoever wants one
# does not wait for what only the others need, like asyncio beside `LLM`.
_HOMES = {
    "LLM": "rapshee_engine.llm",
    "AsyncEngine": "rapshee_engine.engine.async_engine",
    "SamplingParams": "rapshee_engine.sampling_params",
    "__version__": "rapshee_engine._core",
}

if not TYPE_CHECKING:  # or every name would exist for type checkers

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
