"""Which engine serves which model name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.engine.stats import EngineStats
from rapshee_engine.sampling_params import SamplingParams
from rapshee_engine.server.errors import ApiError
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["EngineRegistry", "EngineSlot", "ServedModel", "ServingEngine"]


class ServingEngine(Protocol):
    """What the server needs of an engine; `AsyncEngine` is one."""

    def generate(
        self,
        prompt: Mapping[str, Any],
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they come. Closing the generator aborts the request."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation. Blocks; any thread may call it."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def is_ready(self) -> bool: ...


class EngineSlot:
    """One engine with its bound on completions that run or wait. Owned by the event loop."""

    def __init__(self, engine: ServingEngine, *, max_pending: int) -> None:
        self.engine = engine
        self._max_pending = max_pending
        self._pending = 0

    @contextmanager
    def admit(self, completions: int) -> Iterator[None]:
        """Hold room for so many completions.

        Raises:
            ApiError: 503, there is no room.
        """
        # An idle engine takes any request, so that none is refused for ever.
        if self._pending and self._pending + completions > self._max_pending:
            raise ApiError.try_later(
                "The server is overloaded; try again shortly.", code="server_overloaded"
            )
        self._pending += completions
        try:
            yield
        finally:
            self._pending -= completions


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that requests may ask for."""

    name: str
    created: int
    slot: EngineSlot


class EngineRegistry:
    """Served names and their engines; two names may share one engine.

    A request's ``model`` is only ever looked up here; it is never a path.
    """

    def __init__(
        self, engines: Mapping[str, ServingEngine], *, created: int, max_pending: int
    ) -> None:
        """``created``: seconds since the epoch that the models report."""
        self._slots = {
            id(engine): EngineSlot(engine, max_pending=max_pending) for engine in engines.values()
        }
        self._models = {
            name: ServedModel(name, created, self._slots[id(engine)])
            for name, engine in engines.items()
        }

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def engines(self) -> Iterator[tuple[str, ServingEngine]]:
        """Each engine once, with the first of its names."""
        seen: set[EngineSlot] = set()
        for model in self:
            if model.slot not in seen:
                seen.add(model.slot)
                yield model.name, model.slot.engine

    def get(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            ApiError: 404, no such model.
        """
        model = self._models.get(name)
        if model is None:
            shown = name if len(name) <= 128 else f"{name[:128]}…"
            raise ApiError(
                404,
                f"The model `{shown}` does not exist; available: {', '.join(self._models)}",
                param="model",
                code="model_not_found",
            )
        return model

    def not_ready(self) -> list[str]:
        """Names whose engine does not answer."""
        return [model.name for model in self if not model.slot.engine.is_ready]
