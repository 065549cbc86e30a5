"""What the answers of several endpoints have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from rapshee_engine.engine.outputs import CompletionOutput, Logprob
from rapshee_engine.errors import StepError
from rapshee_engine.server.sse import DONE, event

__all__ = ["AnswerHeader", "ChunkFrame", "Usage", "finish_reason", "json_logprob"]

# JSON has no infinity. OpenAI's own value for "too unlikely to say".
_LOWEST_LOGPROB = -9999.0
_FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True, slots=True)
class AnswerHeader:
    """What all parts of one answer have in common.

    Attributes:
        id: ``chatcmpl-...`` or ``cmpl-...``.
        created: seconds since the epoch.
        model: the name that was asked for.
        system_fingerprint: digest of engine build, weights and kernel set.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer; ``cached`` are those of the prompt that the prefix cache had."""

    prompt: int
    completion: int
    cached: int

    def fields(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


class ChunkFrame:
    """Makes the events of one stream. The part of a chunk that never changes is encoded once."""

    def __init__(self, header: AnswerHeader, kind: str, *, include_usage: bool) -> None:
        self._include_usage = include_usage
        constant = msgspec.json.encode(header.fields(kind))
        self._before_choices = constant[:-1] + b',"choices":['
        self._after_choices = b'],"usage":null}' if include_usage else b"]}"

    def chunk(self, choice: Any) -> bytes:
        return event(self._before_choices + msgspec.json.encode(choice) + self._after_choices)

    def end(self, usage: Usage) -> list[bytes]:
        """The usage chunk where it was asked for, and the end mark."""
        if not self._include_usage:
            return [DONE]
        counts = msgspec.json.encode(usage.fields())
        return [event(self._before_choices + b'],"usage":' + counts + b"}"), DONE]


def finish_reason(completion: CompletionOutput) -> str | None:
    """The API's reason, None for a completion that goes on.

    Raises:
        StepError: the engine gave the request up, for which the API has no reason.
    """
    reason = completion.finish_reason
    if reason is not None and reason not in _FINISH_REASONS:
        raise StepError(f"the request ended with {reason!r}")
    return reason


def json_logprob(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST_LOGPROB)
