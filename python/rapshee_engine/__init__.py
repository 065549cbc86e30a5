"""Rapshee Engine: LLM inference without torch, embedded or behind an OpenAI-compatible server."""

from __future__ import annotations

from rapshee_engine._core import __version__
from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.llm import LLM
from rapshee_engine.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncEngine", "SamplingParams", "__version__"]
