"""What a request yields. Names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CompletionOutput", "Logprob", "RequestOutput", "TokenLogprobs"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position.

    Attributes:
        logprob: its log-probability under the unmodified logits.
        rank: its 1-based rank there.
        decoded_token: the token as text; bytes that are no UTF-8 on their own as U+FFFD.
        token_bytes: the token's exact bytes.
    """

    logprob: float
    rank: int
    decoded_token: str
    token_bytes: bytes


TokenLogprobs = dict[int, Logprob]
"""Token id -> `Logprob`: the position's own token first, then the most likely, best first."""


@dataclass(slots=True)
class CompletionOutput:
    """One completion: whole, so far, or what is new, by ``SamplingParams.output_kind``.

    Attributes:
        index: which of the request's ``n``.
        text: text; stop strings left out.
        token_ids: generated tokens, an end-of-sequence or stop token included.
        logprobs: one entry a token of ``token_ids`` where asked for.
        finish_reason: ``stop``, ``length`` or ``abort``; None while running.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
        num_tokens: tokens generated so far, whatever ``output_kind`` says.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """State of one request.

    Attributes:
        prompt: the prompt as given, or None for token ids.
        prompt_token_ids: its tokens.
        prompt_logprobs: one entry a prompt token (None for the first) where asked for.
        outputs: the completions. In a stream, those that changed.
        finished: whether all completions have ended.
        num_cached_tokens: prompt tokens taken from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
