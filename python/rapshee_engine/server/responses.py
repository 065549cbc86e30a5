"""Chat completions as they go out: the whole object, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from rapshee_engine.engine.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from rapshee_engine.server.answers import (
    AnswerHeader,
    ChunkFrame,
    Usage,
    finish_reason,
    json_logprob,
)

__all__ = ["ChunkWriter", "chat_completion"]


def chat_completion(header: AnswerHeader, output: RequestOutput, *, top_logprobs: int) -> bytes:
    """The answer to a request without streaming; ``output`` holds its finished completions, whose
    log-probabilities list ``top_logprobs`` alternatives for each token."""
    choices = [
        {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": _logprobs(completion, top_logprobs),
            "finish_reason": finish_reason(completion),
        }
        for completion in sorted(output.outputs, key=lambda completion: completion.index)
    ]
    num_completion_tokens = sum(completion.num_tokens for completion in output.outputs)
    return msgspec.json.encode(
        {
            **header.fields("chat.completion"),
            "choices": choices,
            "usage": _usage(output, num_completion_tokens).fields(),
        }
    )


class ChunkWriter:
    """Events of one stream of ``n`` choices, in the order of the contract."""

    def __init__(
        self, header: AnswerHeader, *, n: int, include_usage: bool, top_logprobs: int
    ) -> None:
        self._top_logprobs = top_logprobs
        self._frame = ChunkFrame(header, "chat.completion.chunk", include_usage=include_usage)
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
            reason = finish_reason(completion)
            if reason is not None:
                events.append(self._chunk(completion.index, {}, finish_reason=reason))
        if output.finished:
            events += self._frame.end(_usage(output, sum(self._num_tokens)))
        return events

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, str],
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        return self._frame.chunk(
            {
                "index": index,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": finish_reason,
            }
        )


def _usage(output: RequestOutput, num_completion_tokens: int) -> Usage:
    return Usage(len(output.prompt_token_ids), num_completion_tokens, output.num_cached_tokens)


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
        "logprob": json_logprob(entry),
        "bytes": list(entry.token_bytes),
    }
