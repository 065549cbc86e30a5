"""Validated, frozen options of one request. Names are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from rapshee_engine.errors import InvalidRequestError

__all__ = ["RequestOutputKind", "SamplingParams"]

MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 128


class RequestOutputKind(Enum):
    """What each output of a stream holds."""

    CUMULATIVE = "cumulative"  # everything so far
    DELTA = "delta"  # what is new
    FINAL_ONLY = "final_only"  # one output, at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    Order of operations on the logits: allowed tokens, logit bias, repetition, frequency and
    presence penalty, temperature, min-p, top-k, top-p, draw. Log-probabilities are those of the
    unmodified logits.

    Attributes:
        n: completions of the prompt, 1 to 128. Completion ``i`` draws with ``seed + i``.
        max_tokens: most tokens to generate; None: up to the end of the context. 0: the prompt is
            computed, for its log-probabilities or for the prefix cache, and nothing is drawn.
        min_tokens: end-of-sequence and stop tokens are not drawn before that many tokens.
        temperature: 0 to 2; 0 is greedy.
        top_k: draw from the k most likely tokens; 0 or -1: off.
        top_p: draw from the smallest set whose probability reaches it, (0, 1].
        min_p: drop tokens less likely than ``min_p`` times the most likely, [0, 1].
        repetition_penalty: divides (or multiplies, if negative) logits of tokens in prompt and
            output, (0, 10]; 1: off.
        presence_penalty, frequency_penalty: subtracted from logits of tokens in the output, once
            and for each occurrence, -2 to 2.
        logit_bias: token id -> added to its logit, -100 to 100. Here, in ``stop`` and in
            ``stop_token_ids``, None is taken as empty.
        allowed_token_ids: only these are drawn.
        seed: an integer; equal seeds give equal draws. None: a fresh one.
        stop: strings that end the text; never part of it.
        stop_token_ids: tokens that end the text; never part of it.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: go on past the end-of-sequence token.
        logprobs: log-probability of each chosen token and of so many most likely ones, 0 to 20.
        prompt_logprobs: the same for the prompt's tokens; such a request skips the prefix cache.
        skip_special_tokens: leave control tokens out of the text.
        output_kind: what a stream's outputs hold.

    Raises:
        InvalidRequestError: a value out of its range; ``param`` names the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, 128)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, 1 << 31)
        _integer("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
                param="min_tokens",
            )
        _number("temperature", self.temperature, 0.0, 2.0)
        _integer("top_k", self.top_k, -1, (1 << 31) - 1)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be above 0 and at most 1, got 0", param="top_p")
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0)
        if self.repetition_penalty == 0.0:
            raise InvalidRequestError(
                "repetition_penalty must be above 0, got 0", param="repetition_penalty"
            )
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise InvalidRequestError(
                    "allowed_token_ids must not be empty", param="allowed_token_ids"
                )
            object.__setattr__(self, "allowed_token_ids", allowed)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(
            self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids)
        )
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequestError(
                f"at most {MAX_STOP_TOKENS} stop_token_ids, got {len(self.stop_token_ids)}",
                param="stop_token_ids",
            )
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            _instance(name, getattr(self, name), bool)
        _instance("output_kind", self.output_kind, RequestOutputKind)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def uses_penalties(self) -> bool:
        """Whether drawing needs the counts of the tokens seen so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) for s in strings):
        raise InvalidRequestError("stop must be a string or a list of strings", param="stop")
    if any(not s for s in strings):
        raise InvalidRequestError("stop must not contain an empty string", param="stop")
    return tuple(strings)


def _token_ids(name: str, token_ids: object) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    if not isinstance(token_ids, Sequence):
        raise InvalidRequestError(f"{name} must be a list of token ids", param=name)
    for token_id in token_ids:
        _integer(name, token_id, 0, (1 << 31) - 1)
    return tuple(token_ids)


def _biases(biases: object) -> Mapping[int, float]:
    if biases is None:
        return {}
    if not isinstance(biases, Mapping):
        raise InvalidRequestError("logit_bias must map token ids to numbers", param="logit_bias")
    for token_id, bias in biases.items():
        _integer("logit_bias", token_id, 0, (1 << 31) - 1)
        _number(f"logit_bias.{token_id}", bias, -100.0, 100.0)
    return dict(biases)


def _instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{name} must be a {kind.__name__}, got {value!r}", param=name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(
            f"{name} must be an integer from {low} to {high}, got {value!r}", param=name
        )


def _number(name: str, value: object, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise InvalidRequestError(
            f"{name} must be a number from {low:g} to {high:g}, got {value!r}", param=name
        )
