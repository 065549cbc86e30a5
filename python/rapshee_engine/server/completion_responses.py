"""Text completions as they go out: the whole object, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from rapshee_engine.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from rapshee_engine.server.answers import AnswerHeader, ChunkFrame, Usage, finish_reason
from rapshee_engine.server.completion_schemas import CompletionRequest, GivenPrompt
from rapshee_engine.server.legacy_logprobs import LegacyLogprobs, TextPositions, token_string
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["TextChunkWriter", "TextCompletion"]

_KIND = "text_completion"

Batch = Sequence[tuple[int, RequestOutput]]
"""Outputs with the index of their prompt."""


class TextCompletion:
    """The answer to a request without streaming. Each prompt's choices are encoded when it is done,
    so that a request for the log-probabilities of many long texts holds bytes, not objects."""

    def __init__(
        self, header: AnswerHeader, request: CompletionRequest, tokenizer: Tokenizer
    ) -> None:
        self._header = header
        self._prompts = _prompt_writers(request, tokenizer)
        self._choices: list[list[msgspec.Raw]] = [[] for _ in self._prompts]

    def take(self, batch: Batch) -> None:
        """Final outputs, one a prompt."""
        for index, output in batch:
            parts = sorted(self._prompts[index].parts(output), key=lambda part: int(part["index"]))
            self._choices[index] = [msgspec.Raw(msgspec.json.encode(part)) for part in parts]

    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                **self._header.fields(_KIND),
                "choices": [choice for choices in self._choices for choice in choices],
                "usage": _usage(self._prompts).fields(),
            }
        )


class TextChunkWriter:
    """Events of one stream. Choices interleave; the last chunk of each has its finish reason."""

    def __init__(
        self, header: AnswerHeader, request: CompletionRequest, tokenizer: Tokenizer
    ) -> None:
        self._frame = ChunkFrame(header, _KIND, include_usage=request.include_usage)
        self._prompts = _prompt_writers(request, tokenizer)

    def continuation(self, batch: Batch) -> list[bytes]:
        """Chunks of what is new."""
        return [
            self._frame.chunk(part)
            for index, output in batch
            for part in self._prompts[index].parts(output)
            if _says_something(part)
        ]

    def end(self) -> list[bytes]:
        return self._frame.end(_usage(self._prompts))


def _says_something(part: dict[str, Any]) -> bool:
    logprobs: LegacyLogprobs | None = part["logprobs"]
    has_tokens = logprobs is not None and bool(logprobs.tokens)
    return bool(part["text"]) or has_tokens or part["finish_reason"] is not None


def _prompt_writers(request: CompletionRequest, tokenizer: Tokenizer) -> list[_PromptWriter]:
    return [
        _PromptWriter(prompt, request, tokenizer, first_index=index * request.num_choices)
        for index, prompt in enumerate(request.prompts())
    ]


def _usage(prompts: Sequence[_PromptWriter]) -> Usage:
    """Each prompt counts once, each completion that was generated counts, shown or not."""
    return Usage(
        prompt=sum(prompt.num_prompt_tokens for prompt in prompts),
        completion=sum(sum(prompt.num_tokens) for prompt in prompts),
        cached=sum(prompt.num_cached_tokens for prompt in prompts),
    )


class _PromptWriter:
    """The choices of one prompt, as far as its outputs have come.

    Attributes:
        num_tokens: tokens of each completion so far.
    """

    def __init__(
        self,
        prompt: GivenPrompt,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        *,
        first_index: int,
    ) -> None:
        self.num_tokens = [0] * request.num_completions
        self.num_prompt_tokens = self.num_cached_tokens = 0
        self._prompt = prompt
        self._request = request
        self._tokenizer = tokenizer
        self._first_index = first_index
        self._choices: list[_ChoiceWriter] = []

    def parts(self, output: RequestOutput) -> list[dict[str, Any]]:
        """What is new as parts of choices, with everything that a whole choice has."""
        if not self._choices:
            self._start(output)
        for completion in output.outputs:
            self.num_tokens[completion.index] = completion.num_tokens
        completions = output.outputs
        if len(self._choices) < len(completions):
            completions = _best(completions, len(self._choices))
        return [self._choices[completion.index].part(completion) for completion in completions]

    def _start(self, output: RequestOutput) -> None:
        self.num_prompt_tokens = len(output.prompt_token_ids)
        self.num_cached_tokens = output.num_cached_tokens
        echo = None
        if self._request.echo:
            text = self._prompt.content if isinstance(self._prompt.content, str) else None
            echo = _Echo(text, output, self._tokenizer)
        self._choices = [
            _ChoiceWriter(
                self._first_index + index,
                TextPositions(
                    self._tokenizer,
                    start=0 if echo is None else len(echo.text),
                    after=output.prompt_token_ids,
                ),
                echo,
                with_logprobs=self._request.logprobs is not None,
            )
            for index in range(self._request.num_choices)
        ]


def _best(completions: Sequence[CompletionOutput], count: int) -> list[CompletionOutput]:
    """Those with the highest log-probability a token, best first."""
    # Of equals the first stays the first.
    best = sorted(completions, key=_mean_logprob, reverse=True)
    return [replace(completion, index=index) for index, completion in enumerate(best[:count])]


def _mean_logprob(completion: CompletionOutput) -> float:
    logprobs = [next(iter(position.values())).logprob for position in completion.logprobs or ()]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


class _Echo:
    """A prompt as its choices repeat it: a text as it was given, or the text of token ids with its
    control tokens shown."""

    def __init__(self, text: str | None, output: RequestOutput, tokenizer: Tokenizer) -> None:
        positions = TextPositions(tokenizer, show_control=True)
        pushed = [positions.push(token_id) for token_id in output.prompt_token_ids]
        made = "".join(part for _, part in pushed) + positions.finish()
        self.text = made if text is None else text
        self.logprobs = LegacyLogprobs()
        if output.prompt_logprobs is None:
            return
        # What the tokenizer put before the text, such as a control token, has no place in it.
        added = len(made) - len(self.text) if made.endswith(self.text) else 0
        offsets = [min(max(offset - added, 0), len(self.text)) for offset, _ in pushed]
        first_token = token_string(tokenizer.token_bytes(output.prompt_token_ids[0]))
        for position, offset in zip(output.prompt_logprobs, offsets, strict=True):
            if position is None:
                self.logprobs.add_unpredicted(first_token, offset)
            else:
                self.logprobs.add(position, offset)


class _ChoiceWriter:
    """One choice, part by part; the first part begins with the echo."""

    def __init__(
        self, index: int, positions: TextPositions, echo: _Echo | None, *, with_logprobs: bool
    ) -> None:
        self._index = index
        self._echo = echo
        self._with_logprobs = with_logprobs
        self._positions = positions

    def part(self, completion: CompletionOutput) -> dict[str, Any]:
        echo, self._echo = self._echo, None
        logprobs = None
        if self._with_logprobs:
            logprobs = LegacyLogprobs() if echo is None else echo.logprobs.copy()
            self._add(logprobs, completion.logprobs or ())
        return {
            "index": self._index,
            "text": completion.text if echo is None else echo.text + completion.text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(completion),
        }

    def _add(self, logprobs: LegacyLogprobs, positions: Sequence[TokenLogprobs]) -> None:
        for position in positions:
            offset, _ = self._positions.push(next(iter(position)))
            logprobs.add(position, offset)
