"""The engine: takes requests, runs steps, gives outputs. One thread at a time calls it."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from rapshee_engine.cache import cache_folder
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.batch_builder import BatchBuilder
from rapshee_engine.engine.input_processor import InputProcessor, Prompt
from rapshee_engine.engine.output_processor import Completion, RequestGroup, StepRows
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.engine.request import Request, RequestStatus
from rapshee_engine.engine.runner import Runner, StepRunner
from rapshee_engine.engine.scheduler import ScheduledSequence, ScheduledStep, Scheduler
from rapshee_engine.engine.stats import EngineStats
from rapshee_engine.errors import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    RapsheeError,
    StepError,
    UnsupportedModelError,
    WeightFileError,
)
from rapshee_engine.sampling_params import SamplingParams
from rapshee_engine.tokenizer.chat_template import ChatTemplate
from rapshee_engine.tokenizer.gguf_vocab import chat_template_from_gguf, tokenizer_from_gguf
from rapshee_engine.tokenizer.hf_folder import chat_template_from_folder, tokenizer_from_folder
from rapshee_engine.tokenizer.tokenizer import Tokenizer
from rapshee_engine.weights.loader import Checkpoint, load_checkpoint
from rapshee_engine.weights.quantized_cache import quantized

__all__ = ["Engine", "RequestFailure"]

_logger = logging.getLogger(__name__)

_NO_TOKEN = -1
"""What the runner gives for a row whose logits are not finite or whose mask allows nothing."""


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A request that ended by an error instead of an output."""

    request_id: str
    error: RapsheeError


class Engine:
    """Everything between a prompt and its output, except threads.

    Attributes:
        input_processor: makes the requests that `add` takes; any thread may use it.
        dead: why no step can run any more, or None.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: StepRunner,
        tokenizer: Tokenizer,
        *,
        max_position: int,
        eos_token_ids: frozenset[int] = frozenset(),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """Wire the parts. The engine owns ``runner`` from now on."""
        self.config = config
        self.runner = runner
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.max_model_len = _max_model_len(config.max_model_len, max_position)
        self.stats = EngineStats()
        self.dead: EngineDeadError | None = None
        eos_token_ids |= tokenizer.eos_token_ids
        self.scheduler = Scheduler(
            kv_groups=runner.kv_groups,
            block_size=runner.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.input_processor = InputProcessor(
            tokenizer=tokenizer,
            vocab_size=runner.vocab_size,
            max_model_len=self.max_model_len,
            kv_cache_tokens=self.scheduler.kv_cache.max_sequence_tokens,
            eos_token_ids=eos_token_ids,
        )
        self._builder = BatchBuilder(
            vocab_size=runner.vocab_size,
            block_size=runner.block_size,
            num_kv_groups=len(runner.kv_groups),
            max_num_seqs=config.max_num_seqs,
            max_blocks_per_seq=self.scheduler.kv_cache.blocks_for(self.max_model_len),
            end_token_ids=eos_token_ids,
        )
        overlap = config.async_scheduling
        if overlap is None:
            overlap = runner.is_asynchronous
        self._max_in_flight = int(overlap)  # once step() has returned
        self._in_flight: deque[tuple[ScheduledStep, int]] = deque()  # with their tickets
        self._groups: dict[str, RequestGroup] = {}
        self._completions: dict[Request, tuple[RequestGroup, Completion]] = {}
        self._changed: dict[RequestGroup, None] = {}
        self._events: list[RequestOutput | RequestFailure] = []
        self._is_closed = False

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Load the checkpoint at ``config.model``.

        Raises:
            ConfigError, WeightFileError, UnsupportedModelError: it cannot be loaded so.
        """
        checkpoint = load_checkpoint(
            config.model, config.load_format, context_length=config.max_model_len
        )
        tokenizer, template = _text_parts(config, checkpoint)
        _check_named_tokens(tokenizer, checkpoint)
        return cls(
            config,
            _runner(config, checkpoint),
            tokenizer,
            max_position=checkpoint.config.max_position,
            eos_token_ids=frozenset(checkpoint.eos_token_ids),
            chat_template=template,
        )

    @property
    def fingerprint(self) -> str:
        """Digest of build, device and weights: equal fingerprints answer equally."""
        return "fp_" + blake2b(self.runner.identity.encode(), digest_size=8).hexdigest()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do or to hand out."""
        return bool(self._groups or self._in_flight or self._changed or self._events)

    # Requests

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation. Any thread may call it.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses.
        """
        if self.chat_template is None:
            raise InvalidRequestError("this model has no chat template", param="messages")
        return self.chat_template.render_ids(
            self.tokenizer, messages, add_generation_prompt=add_generation_prompt
        )

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        cache_salt: str = "",
    ) -> None:
        """Check and queue a request; see `InputProcessor.process` for what is refused."""
        self.add(
            self.input_processor.process(request_id, prompt, sampling_params, cache_salt=cache_salt)
        )

    def add(self, group: RequestGroup) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: its id is in use.
            EngineDeadError, EngineClosedError: no step can run any more.
        """
        self._require_usable()
        if group.request_id in self._groups:
            raise InvalidRequestError(
                f"request id {group.request_id!r} is in use", param="request_id"
            )
        self._groups[group.request_id] = group
        for completion in group.completions:
            self._completions[completion.request] = (group, completion)
            self.scheduler.add(completion.request)

    def abort(self, request_id: str) -> None:
        """End a request; its last output says ``abort``. Unknown ids are ignored: it may just have
        finished."""
        group = self._groups.get(request_id)
        if group is not None:
            self._end(group, RequestStatus.ABORTED)
            self._changed[group] = None

    # Steps

    def step(self) -> list[RequestOutput | RequestFailure]:
        """Launch a step if there is one to run, collect one, and return what is new.

        Never raises for what happens to requests: whoever a failure concerns gets a
        `RequestFailure`. After a failure for good, `dead` is set and everybody got one.
        """
        if self.dead is None:
            try:
                self._advance()
            except Exception as error:  # a bug here must not leave anybody waiting
                self._die(error)
        self._observe_load()
        return self._take_events()

    def close(self) -> None:
        """Wait for steps in flight and give all memory back. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._in_flight.clear()
            self.runner.close()

    def _advance(self) -> None:
        step = self.scheduler.schedule()
        if step is not None:
            self._observe_admissions(step)
            self._launch(step)
        if self._in_flight and (step is None or len(self._in_flight) > self._max_in_flight):
            self._collect(*self._in_flight.popleft())

    def _launch(self, step: ScheduledStep) -> None:
        try:
            batch = self._builder.build(step)
            for request in step.admitted:
                self._set_state(request)
            ticket = self.runner.launch(batch.step_input)
        except EngineDeadError:
            raise
        except Exception as error:
            self._fail(step, error)
            return
        self._in_flight.append((step, ticket))
        if batch.masks is not None:
            self.runner.set_masks(ticket, batch.masks)

    def _set_state(self, request: Request) -> None:
        if request.sampling_params.uses_penalties:
            token_ids = np.array(request.token_ids, np.int32)
            self.runner.set_state(request.slot, token_ids, request.num_prompt_tokens)

    def _collect(self, step: ScheduledStep, ticket: int) -> None:
        try:
            rows = StepRows(self.runner.collect(ticket), self.tokenizer)
        except EngineDeadError:
            raise
        except Exception as error:
            self._fail(step, error)
            return
        first_rows = _first_rows(step)
        drawn = [
            rows.token_ids[row + sequence.num_scored] if sequence.samples else None
            for sequence, row in zip(step.sequences, first_rows, strict=True)
        ]
        now = time.monotonic()
        accepted = self.scheduler.update(step, drawn)
        for sequence, row in zip(accepted, first_rows, strict=True):
            if sequence is None or sequence.request not in self._completions:
                continue
            group, completion = self._completions[sequence.request]
            if _NO_TOKEN in rows.token_ids[row : row + sequence.num_rows]:
                self._fail_group(group, StepError("the model's output is not finite"))
                continue
            try:
                group.take_rows(completion, sequence, rows, row)
                self._settle(group, completion, sequence, now)
            except Exception as error:  # text that cannot be made concerns this request alone
                # Messages are logged; this exception's may quote the text.
                failure = StepError(f"a token could not be handed out: {type(error).__name__}")
                self._fail_group(group, failure, error)

    def _settle(
        self, group: RequestGroup, completion: Completion, sequence: ScheduledSequence, now: float
    ) -> None:
        """What follows from a sequence's new rows: an output, statistics, perhaps its end."""
        request = sequence.request
        if request.is_finished:
            completion.flush()
        if completion.stop_string is not None:
            self.scheduler.finish(request, RequestStatus.STOPPED)
        if not (sequence.samples or request.is_finished):
            return  # somewhere in the prompt
        self._changed[group] = None
        self._observe_prompt(group)
        if sequence.samples:
            self._observe_token(group, completion, now)
        if request.is_finished:
            self._forget(group, completion)

    # Ends

    def _fail(self, step: ScheduledStep, error: Exception) -> None:
        """The requests of a failed step end; a request ends as a whole."""
        message = str(error) if isinstance(error, StepError) else f"a step failed: {error}"
        for request in self.scheduler.fail(step):
            entry = self._completions.get(request)
            if entry is not None:
                self._fail_group(entry[0], StepError(message), error)

    def _fail_group(
        self, group: RequestGroup, failure: RapsheeError, cause: Exception | None = None
    ) -> None:
        """``failure`` belongs to this request alone: whoever reads it may raise it."""
        failure.__cause__ = cause
        self._end(group, RequestStatus.FAILED)
        self._changed.pop(group, None)
        self._events.append(RequestFailure(group.request_id, failure))

    def _die(self, error: Exception) -> None:
        if isinstance(error, EngineDeadError):
            self.dead = error
        else:
            self.dead = EngineDeadError(f"the step loop failed: {error}")
            self.dead.__cause__ = error
        self._in_flight.clear()
        for group in list(self._groups.values()):
            self._fail_group(group, EngineDeadError(str(self.dead)), self.dead)

    def _end(self, group: RequestGroup, status: RequestStatus) -> None:
        for completion in group.completions:
            if completion.request in self._completions:
                self.scheduler.finish(completion.request, status)
                self._forget(group, completion)
                group.changed.append(completion)

    def _forget(self, group: RequestGroup, completion: Completion) -> None:
        """A completion has ended; with its last one the request is done."""
        del self._completions[completion.request]
        self._observe_end(group, completion)
        if group.is_finished:
            self._groups.pop(group.request_id, None)  # several may have ended in one step

    def _take_events(self) -> list[RequestOutput | RequestFailure]:
        changed, self._changed = self._changed, {}
        events, self._events = self._events, []
        for group in changed:
            output = group.output()
            if output is not None:
                events.append(output)
        return events

    def _require_usable(self) -> None:
        if self._is_closed:
            raise EngineClosedError("the engine is closed")
        if self.dead is not None:
            raise EngineDeadError(str(self.dead)) from self.dead

    # Statistics

    def _observe_admissions(self, step: ScheduledStep) -> None:
        stats = self.stats
        stats.num_steps += 1
        for request in step.admitted:
            if not request.num_preemptions:
                group, _ = self._completions[request]
                stats.queue_time.observe(time.monotonic() - group.arrival_time)
                if self.config.enable_prefix_caching and request.use_prefix_cache:
                    stats.prefix_cache_queries += request.num_prompt_tokens
                    stats.prefix_cache_hits += request.num_cached_tokens

    def _observe_load(self) -> None:
        scheduler, stats = self.scheduler, self.stats
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting)
        stats.num_preemptions = scheduler.num_preemptions
        stats.kv_cache_usage = scheduler.kv_cache.usage

    def _observe_prompt(self, group: RequestGroup) -> None:
        if not group.is_prompt_counted:
            group.is_prompt_counted = True
            self.stats.prompt_tokens += len(group.prompt_token_ids)

    def _observe_token(self, group: RequestGroup, completion: Completion, now: float) -> None:
        self.stats.generation_tokens += 1
        if group.first_token_time is None:
            group.first_token_time = now
            self.stats.time_to_first_token.observe(now - group.arrival_time)
        if completion.last_token_time is not None:
            self.stats.inter_token_latency.observe(now - completion.last_token_time)
        completion.last_token_time = now

    def _observe_end(self, group: RequestGroup, completion: Completion) -> None:
        stats, request = self.stats, completion.request
        stats.finished[request.status.value] += 1
        stats.request_prompt_tokens.observe(request.num_prompt_tokens)
        stats.request_generation_tokens.observe(request.num_output_tokens)
        stats.request_latency.observe(time.monotonic() - group.arrival_time)


def _first_rows(step: ScheduledStep) -> list[int]:
    """The first output row of each sequence."""
    rows, row = [], 0
    for sequence in step.sequences:
        rows.append(row)
        row += sequence.num_rows
    return rows


def _max_model_len(asked: int | None, max_position: int) -> int:
    if asked is not None and asked > max_position:
        raise ConfigError(
            f"max_model_len ({asked}) is longer than the model's context ({max_position})"
        )
    return asked or max_position


def _runner(config: EngineConfig, checkpoint: Checkpoint) -> Runner:
    if config.quantize is None:
        return Runner(config, checkpoint)
    cache = cache_folder(os.environ)
    with quantized(checkpoint, config.quantize, cache, config.threads) as low_bit:
        return Runner(config, low_bit)


def _check_named_tokens(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Others beyond the embedding may exist, as of a larger model of the family: a request that
    holds one is refused."""
    vocab_size = checkpoint.config.vocab_size
    for what, ids in (
        ("begins a text", {tokenizer.bos_token_id} - {None}),
        ("ends a text", tokenizer.eos_token_ids),
    ):
        for token_id in ids:
            if token_id is not None and token_id >= vocab_size:
                raise WeightFileError(
                    checkpoint.path,
                    f"the token that {what} has the id {token_id}, the model {vocab_size} tokens",
                )


def _text_parts(
    config: EngineConfig, checkpoint: Checkpoint
) -> tuple[Tokenizer, ChatTemplate | None]:
    """Tokenizer and chat template of a checkpoint."""
    path, metadata = Path(checkpoint.path), checkpoint.gguf_metadata
    files = ("tokenizer.json", "tokenizer.model")
    if checkpoint.format == "dummy" and not any((path / file).is_file() for file in files):
        if config.chat_template is not None:
            raise ConfigError(f"chat_template needs a tokenizer, and {config.model!r} has none")
        return Tokenizer.without_vocabulary(), None
    if metadata is not None:
        tokenizer = tokenizer_from_gguf(metadata, checkpoint.path)
        source = chat_template_from_gguf(metadata, checkpoint.path)
    else:
        tokenizer = tokenizer_from_folder(path)
        source = chat_template_from_folder(path)
    source = config.chat_template or source
    if source is None:
        return tokenizer, None
    try:
        template = ChatTemplate(
            source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
    except UnsupportedModelError as error:
        if config.chat_template is not None:
            raise ConfigError(str(error)) from error
        # The model can still complete text.
        _logger.warning("chat is not available for %s: %s", config.model, error)
        return tokenizer, None
    return tokenizer, template
