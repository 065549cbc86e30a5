"""Chat completions as they go out: the whole object, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from rapshee_engine.engine.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from rapshee_engine.errors import StepError
from rapshee_engine.server.sse import DONE, event

__all__ = ["ChunkWriter", "CompletionHeader", "chat_completion"]

# JSON has no infinity. OpenAI's own value for "too unlikely to say".
_LOWEST_LOGPROB = -9999.0
_FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True, slots=True)
class CompletionHeader:
    """What all parts of one answer have in common.

    Attributes:
        id: ``chatcmpl-...``.
        created: seconds since the epoch.
        model: the name that was asked for.
        system_fingerprint: digest of engine build, weights and kernel set.
        top_logprobs: how many alternatives each token's log-probabilities list.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str
    top_logprobs: int

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def chat_completion(header: CompletionHeader, output: RequestOutput) -> bytes:
    """The answer to a request without streaming; ``output`` holds its finished completions."""
    choices = [
        {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": _logprobs(completion, header.top_logprobs),
            "finish_reason": _finish_reason(completion),
        }
        for completion in sorted(output.outputs, key=lambda completion: completion.index)
    ]
    num_completion_tokens = sum(completion.num_tokens for completion in output.outputs)
    return msgspec.json.encode(
        {
            **header.fields("chat.completion"),
            "choices": choices,
            "usage": _usage(output, num_completion_tokens),
        }
    )


class ChunkWriter:
    """Events of one stream, in the order of the contract.

    The part of a chunk that never changes is encoded once.
    """

    def __init__(self, header: CompletionHeader, *, n: int, include_usage: bool) -> None:
        self._top_logprobs = header.top_logprobs
        self._include_usage = include_usage
        constant = msgspec.json.encode(header.fields("chat.completion.chunk"))
        self._before_choices = constant[:-1] + b',"choices":['
        self._after_choices = b'],"usage":null}' if include_usage else b"]}"
        self._num_tokens = [0] * n

    def start(self) -> list[bytes]:
        """The role chunks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta) for index in range(len(self._num_tokens))]

    def continuation(self, output: RequestOutput) -> list[bytes]:
        """Chunks of what is new; after the last output the end of the stream."""
        events = []
        for completion in output.outputs:
            self._num_tokens[completion.index] = completion.num_tokens
            logprobs = _logprobs(completion, self._top_logprobs)
            if completion.text or (logprobs and logprobs["content"]):
                events.append(
                    self._chunk(completion.index, {"content": completion.text}, logprobs=logprobs)
                )
            reason = _finish_reason(completion)
            if reason is not None:
                events.append(self._chunk(completion.index, {}, finish_reason=reason))
        return events + self._end(output) if output.finished else events

    def _end(self, output: RequestOutput) -> list[bytes]:
        """The usage chunk where it was asked for, and the end mark."""
        if not self._include_usage:
            return [DONE]
        usage = msgspec.json.encode(_usage(output, sum(self._num_tokens)))
        return [event(self._before_choices + b'],"usage":' + usage + b"}"), DONE]

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, str],
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return event(self._before_choices + msgspec.json.encode(choice) + self._after_choices)


def _finish_reason(completion: CompletionOutput) -> str | None:
    reason = completion.finish_reason
    if reason is not None and reason not in _FINISH_REASONS:
        # The engine gave the request up; the API has no finish_reason for that.
        raise StepError(f"the request ended with {reason!r}")
    return reason


def _usage(output: RequestOutput, num_completion_tokens: int) -> dict[str, Any]:
    num_prompt_tokens = len(output.prompt_token_ids)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _logprobs(completion: CompletionOutput, top_logprobs: int) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    return {"content": [_position(position, top_logprobs) for position in completion.logprobs]}


def _position(position: TokenLogprobs, top_logprobs: int) -> dict[str, Any]:
    """One token with its alternatives. The chosen token comes first in ``position`` and is among
    the alternatives only if its rank says so."""
    entries = list(position.values())
    best = sorted(entries, key=lambda entry: entry.rank)[:top_logprobs]
    return {**_token(entries[0]), "top_logprobs": [_token(entry) for entry in best]}


def _token(entry: Logprob) -> dict[str, Any]:
    return {
        "token": entry.decoded_token,
        "logprob": max(entry.logprob, _LOWEST_LOGPROB),
        "bytes": list(entry.token_bytes),
    }
