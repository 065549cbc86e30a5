"""The text-completion request: its fields, their bounds, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.server.errors import ApiError
from rapshee_engine.server.fields import (
    NumCompletions,
    Penalty,
    Probability,
    StreamOptions,
    Temperature,
    UnknownFieldLog,
    check_shared,
    decode_body,
    includes_usage,
    shared_sampling_options,
    unknown_names,
    unsupported,
)

__all__ = ["CompletionRequest", "GivenPrompt", "parse_completion_request"]

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_COMPLETIONS = 128  # of all prompts together, as the bound on n is


@dataclass(frozen=True, slots=True)
class GivenPrompt:
    """One prompt of a request: a text or token ids. ``path`` is where it stands in the body."""

    path: str
    content: str | list[int]


class CompletionRequest(Struct):
    """Body of ``POST /v1/completions``: every field that OpenAI documents."""

    model: str
    prompt: Any

    max_tokens: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: NumCompletions | None = None
    best_of: NumCompletions | None = None
    stop: str | list[str] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # The empty text asks for what is done anyway.
    suffix: str | None = None

    # It cannot change the answer.
    user: str | None = None

    @property
    def num_choices(self) -> int:
        """Choices of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def num_completions(self) -> int:
        """Completions to generate of each prompt; the best of them are its choices."""
        return max(self.num_choices, self.best_of or 1)

    @property
    def completion_limit(self) -> int:
        return _DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own log-probabilities are asked for."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def include_usage(self) -> bool:
        return includes_usage(self)

    def prompts(self) -> list[GivenPrompt]:
        """The prompts, in order.

        Raises:
            ApiError: 400, ``prompt`` is none of the forms that it may have.
        """
        if isinstance(self.prompt, str):
            return [GivenPrompt("prompt", self.prompt)]
        if not isinstance(self.prompt, list):
            raise _not_a_prompt("prompt", self.prompt)
        if not self.prompt:
            raise ApiError.invalid("'prompt' must not be empty", "prompt")
        if type(self.prompt[0]) is int:
            return [GivenPrompt("prompt", _token_ids(self.prompt, "prompt"))]
        return [_listed_prompt(self.prompt, index) for index in range(len(self.prompt))]

    def sampling_params(self) -> SamplingParams:
        """The options of each prompt for the engine.

        Raises:
            InvalidRequestError: a value that only the engine's own bounds exclude.
        """
        logprobs = self.logprobs
        if logprobs is None and self.num_completions > self.num_choices:
            logprobs = 0  # to tell which are the best
        return SamplingParams(
            n=self.num_completions,
            max_tokens=self.completion_limit,
            **shared_sampling_options(self),
            logprobs=logprobs,
            prompt_logprobs=self.logprobs if self.scores_prompt else None,
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
        )


def parse_completion_request(body: bytes, unknown_fields: UnknownFieldLog) -> CompletionRequest:
    """The request in a JSON body.

    Raises:
        ApiError: 400 naming the field at fault.
    """
    request = decode_body(body, CompletionRequest, _unknown_fields, unknown_fields)
    if request.suffix:
        raise unsupported("suffix", "the models complete at the end of a text only")
    check_shared(request)
    _check_counts(request)
    return request


def _unknown_fields(body: bytes) -> Iterator[str]:
    yield from unknown_names(
        msgspec.json.decode(body, type=dict[str, msgspec.Raw]), CompletionRequest
    )


def _check_counts(request: CompletionRequest) -> None:
    """How many completions are generated, and how many of them are shown."""
    best_of = request.best_of or 1
    if 1 < best_of < request.num_choices:  # 1 is its default, whatever n is
        raise ApiError.invalid(
            f"'best_of' ({best_of}) must not be less than 'n' ({request.n})", "best_of"
        )
    if request.stream and best_of > request.num_choices:
        raise ApiError.invalid(
            "'best_of' above 'n' cannot be streamed: the best are known at the end", "best_of"
        )
    num_prompts = len(request.prompts())
    if num_prompts * request.num_completions > _MAX_COMPLETIONS:
        raise ApiError.invalid(
            f"'prompt' holds {num_prompts} prompts, with {request.num_completions} completions "
            f"each; one request may ask for {_MAX_COMPLETIONS} completions in all",
            "prompt",
        )


def _listed_prompt(prompts: list[Any], index: int) -> GivenPrompt:
    """A text, or token ids, as the first of the list is."""
    path, prompt = f"prompt.{index}", prompts[index]
    if not isinstance(prompt, (str, list)) or type(prompt) is not type(prompts[0]):
        raise _not_a_prompt(path, prompt)
    return GivenPrompt(path, prompt if isinstance(prompt, str) else _token_ids(prompt, path))


def _token_ids(token_ids: list[Any], path: str) -> list[int]:
    if not token_ids:
        raise ApiError.invalid(f"'{path}' must not be empty", path)
    for index, token_id in enumerate(token_ids):
        if type(token_id) is not int:
            raise ApiError.invalid(
                f"Invalid '{path}.{index}': expected a token id, got {_kind(token_id)}",
                f"{path}.{index}",
            )
    return token_ids


def _not_a_prompt(path: str, value: Any) -> ApiError:
    return ApiError.invalid(
        f"Invalid '{path}': 'prompt' must be a string, a list of strings, a list of token ids or a "
        f"list of lists of token ids, got {_kind(value)}",
        path,
    )


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
