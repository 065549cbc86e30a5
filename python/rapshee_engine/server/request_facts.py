"""What is written down about the request that is being answered."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from rapshee_engine.engine.outputs import RequestOutput

__all__ = ["RequestFacts", "begin_request", "current_request_id", "request_facts"]


class RequestFacts:
    """Facts that the parts of the server find out about one request: counts and names, nothing of
    its text.

    Attributes:
        request_id: as in the header ``x-request-id``.
        key: id of the API key.
        model: name of the model that was asked for, once it is known to exist.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.key: str | None = None
        self.model: str | None = None
        self._prompt_tokens: dict[str, int] = {}
        self._completion_tokens: dict[tuple[str, int], int] = {}

    def observe(self, output: RequestOutput) -> None:
        """Count an engine's output; of several for one prompt the last holds."""
        self._prompt_tokens[output.request_id] = len(output.prompt_token_ids)
        for completion in output.outputs:
            self._completion_tokens[output.request_id, completion.index] = completion.num_tokens

    def fields(self) -> Mapping[str, Any]:
        """For the log, in its order."""
        has_output = bool(self._prompt_tokens)
        return {
            "model": self.model,
            "prompt_tokens": sum(self._prompt_tokens.values()) if has_output else None,
            "completion_tokens": sum(self._completion_tokens.values()) if has_output else None,
            "key": self.key,
        }


# Each request is answered in a task of its own, and what it starts inherits this.
_current: ContextVar[RequestFacts | None] = ContextVar("request_facts", default=None)


def begin_request(request_id: str) -> RequestFacts:
    """Facts of the request that the current task answers."""
    facts = RequestFacts(request_id)
    _current.set(facts)
    return facts


def request_facts() -> RequestFacts:
    """Facts of the current request; outside of any, facts that nobody reads."""
    return _current.get() or RequestFacts("")


def current_request_id() -> str | None:
    facts = _current.get()
    return None if facts is None else facts.request_id
