"""From tokens to text: what each request has generated, and what its caller gets to see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rapshee_engine.engine.outputs import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    TokenLogprobs,
)
from rapshee_engine.engine.request import Request, RequestStatus
from rapshee_engine.engine.runner import StepResult
from rapshee_engine.engine.scheduler import ScheduledSequence
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from rapshee_engine.tokenizer.detokenizer import Detokenizer
from rapshee_engine.tokenizer.tokenizer import Tokenizer

__all__ = ["Completion", "RequestGroup", "StepRows"]


class StepRows:
    """A step's result row by row, with tokens as Python values.

    Columns are converted when first asked for: most steps only need the token ids.
    """

    def __init__(self, result: StepResult, tokenizer: Tokenizer) -> None:
        self.token_ids: list[int] = result.token_ids.tolist()
        self._result = result
        self._tokenizer = tokenizer
        self._columns: tuple[list[Any], ...] | None = None

    def logprobs(self, row: int, num_top: int) -> TokenLogprobs:
        """The row's own token first, then the ``num_top`` most likely, best first."""
        if self._columns is None:
            r = self._result
            columns = (r.logprobs, r.ranks, r.top_ids, r.top_logprobs)
            self._columns = tuple(column.tolist() for column in columns)
        logprobs, ranks, top_ids, top_logprobs = self._columns
        token_id = self.token_ids[row]
        entries = {token_id: self._logprob(token_id, logprobs[row], ranks[row])}
        top = zip(top_ids[row][:num_top], top_logprobs[row][:num_top], strict=True)
        for rank, (top_id, logprob) in enumerate(top, 1):
            if top_id not in entries:
                entries[top_id] = self._logprob(top_id, logprob, rank)
        return entries

    def _logprob(self, token_id: int, logprob: float, rank: int) -> Logprob:
        token_bytes = self._tokenizer.token_bytes(token_id)
        return Logprob(logprob, rank, token_bytes.decode("utf-8", "replace"), token_bytes)


class Completion:
    """One of a request's completions: its sequence, its text, and how much of both was handed out.

    Attributes:
        stop_string: the stop string that ended it.
        last_token_time: when its last token was collected, in seconds of a monotonic clock.
    """

    def __init__(self, index: int, request: Request, detokenizer: Detokenizer) -> None:
        self.index = index
        self.request = request
        self.stop_string: str | None = None
        self.last_token_time: float | None = None
        self._detokenizer = detokenizer
        self._text = ""
        self._logprobs: list[TokenLogprobs] | None = None
        if request.sampling_params.logprobs is not None:
            self._logprobs = []
        self._num_emitted_tokens = 0
        self._num_emitted_chars = 0
        self._is_final = False

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Take a token that the scheduler has accepted."""
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
        if self.request.status is RequestStatus.STOPPED:
            return  # an end-of-sequence or stop token is no text
        self._text += self._detokenizer.push([token_id])
        self.stop_string = self._detokenizer.stopped_by

    def flush(self) -> None:
        """Take the text that was held back, which may hold a stop string too. Idempotent; nothing
        may be appended any more."""
        if not self._is_final:
            self._is_final = True
            self._text += self._detokenizer.finish()
            self.stop_string = self._detokenizer.stopped_by

    def output(self, kind: RequestOutputKind) -> CompletionOutput:
        """What the caller gets to see now; a delta is handed out once."""
        request = self.request
        if request.is_finished:
            self.flush()
        first_token = first_char = 0
        if kind is RequestOutputKind.DELTA:
            first_token, first_char = self._num_emitted_tokens, self._num_emitted_chars
        self._num_emitted_tokens = request.num_output_tokens
        self._num_emitted_chars = len(self._text)
        return CompletionOutput(
            index=self.index,
            text=self._text[first_char:],
            token_ids=request.token_ids[request.num_prompt_tokens + first_token :],
            logprobs=None if self._logprobs is None else self._logprobs[first_token:],
            finish_reason=request.status.value if request.is_finished else None,
            stop_reason=request.stop_reason if self.stop_string is None else self.stop_string,
            num_tokens=request.num_output_tokens,
        )


@dataclass(slots=True, eq=False)
class RequestGroup:
    """A request as its caller sees it: one prompt, ``n`` completions.

    Attributes:
        arrival_time: seconds of a monotonic clock.
        first_token_time: when its first token was collected.
        is_prompt_counted: whether statistics have its prompt.
        prompt_logprobs: of the prompt tokens scored so far; None unless asked for.
        changed: completions with something new since the last output.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    completions: list[Completion]
    arrival_time: float
    first_token_time: float | None = None
    is_prompt_counted: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    changed: list[Completion] = field(default_factory=list)
    _emitted_prompt_logprobs: bool = False

    @property
    def is_finished(self) -> bool:
        return all(completion.request.is_finished for completion in self.completions)

    def take_rows(
        self, completion: Completion, sequence: ScheduledSequence, rows: StepRows, row: int
    ) -> None:
        """Take a sequence's rows of a step, beginning with ``row``."""
        params = self.sampling_params
        if sequence.num_scored and self.prompt_logprobs is not None:
            num_top = params.prompt_logprobs or 0
            for index in range(row, row + sequence.num_scored):
                self.prompt_logprobs.append(rows.logprobs(index, num_top))
        if sequence.samples:
            sample_row = row + sequence.num_scored
            logprobs = None
            if params.logprobs is not None:
                logprobs = rows.logprobs(sample_row, params.logprobs)
            completion.append(rows.token_ids[sample_row], logprobs)
        if sequence.samples or completion.request.is_finished:
            self.changed.append(completion)

    def output(self) -> RequestOutput | None:
        """What is new since the last output, or None. With ``FINAL_ONLY`` that is everything, at
        the end; cumulative outputs hold every completion."""
        kind, finished = self.sampling_params.output_kind, self.is_finished
        changed, self.changed = self.changed, []
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        chosen = changed if kind is RequestOutputKind.DELTA else self.completions
        prompt_logprobs = self.prompt_logprobs
        if kind is RequestOutputKind.DELTA and self._emitted_prompt_logprobs:
            prompt_logprobs = None
        self._emitted_prompt_logprobs = True
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.output(kind) for completion in chosen],
            finished=finished,
            prompt_logprobs=None if prompt_logprobs is None else list(prompt_logprobs),
            num_cached_tokens=self.completions[0].request.num_cached_tokens,
        )
