"""Which sequences compute which tokens in the next step. Pure Python, no arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from rapshee_engine.engine.kv_cache import KVCache, KVGroup
from rapshee_engine.engine.prefix_cache import BlockTables
from rapshee_engine.engine.request import Request, RequestStatus

__all__ = ["ScheduledSequence", "ScheduledStep", "Scheduler"]


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's part of a step, as it stood when the step was built.

    Attributes:
        start: position of the first token.
        num_tokens: tokens computed.
        samples: whether its last token draws the next one.
        has_pending_input: its last token is the sample of the step in flight.
        draw_index: index of the token that is drawn, 0 for the first after the prompt.
        first_scored: the prompt log-probabilities wanted from this step are those of prompt tokens
            ``first_scored + 1 .. first_scored + num_scored``, predicted at the positions before.
        slot, admission: the request's at that time.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    has_pending_input: bool
    draw_index: int
    first_scored: int
    num_scored: int
    slot: int
    admission: int

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.num_tokens

    @property
    def num_rows(self) -> int:
        """Rows of the step's result: those that score a prompt token, then one that draws."""
        return self.num_scored + self.samples


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A step to launch.

    Attributes:
        sequences: those with one token first.
        admitted: requests that entered ``running`` since the last step.
    """

    sequences: tuple[ScheduledSequence, ...]
    admitted: tuple[Request, ...]


class _Plan:
    """The step under construction: tokens of each request, within a budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_tokens: dict[Request, int] = {}
        self.admitted: list[Request] = []
        self.starved = False

    def put(self, request: Request, num_tokens: int) -> None:
        self.num_tokens[request] = num_tokens
        self.budget -= num_tokens

    def drop(self, request: Request) -> None:
        self.budget += self.num_tokens.pop(request, 0)


class Scheduler:
    """Continuous batching, first come, first served.

    Every running request arrived before every waiting one. A step takes first the running requests
    with one token to compute, then the chunks of longer ones, then admits from ``waiting``. When
    blocks run out, the request that arrived last is preempted: it gives its blocks back, returns to
    the front of ``waiting`` and computes prompt and generated tokens again. The oldest running
    request always gets its blocks, and a request is only added if the KV cache can hold it alone,
    so every request finishes.

    Steps may be in flight. A request whose step is not collected yet keeps its blocks referenced
    even after it finished or was preempted, and is not admitted again before. A block enters the
    prefix cache once the step that filled it was collected; a failed step fills nothing.
    """

    def __init__(
        self,
        *,
        kv_groups: Sequence[KVGroup],
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.kv_cache = KVCache(
            kv_groups,
            block_size,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.waiting: OrderedDict[Request, None] = OrderedDict()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._free_slots = list(reversed(range(max_num_seqs)))
        self._released_late: list[tuple[Request, BlockTables]] = []  # still in a step in flight
        self._num_arrivals = 0
        self._num_admissions = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request whose prompt and ``max_tokens`` fit the KV cache."""
        num_tokens = request.num_prompt_tokens + request.max_tokens
        if num_tokens > self.kv_cache.max_sequence_tokens:
            raise ValueError(f"request {request.request_id} can never fit the KV cache")
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self.waiting[request] = None

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request at any time. For one that has already ended, only the status changes."""
        if request.status is RequestStatus.WAITING:
            del self.waiting[request]
        elif request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        request.status = status

    # One step

    def schedule(self) -> ScheduledStep | None:
        """Decide the next step, or None if there is nothing to launch now."""
        plan = _Plan(self.max_num_batched_tokens)
        self._schedule_running(plan)
        if not plan.starved:
            self._schedule_waiting(plan)
        return self._commit(plan) if plan.num_tokens else None

    def update(
        self, step: ScheduledStep, token_ids: Sequence[int | None]
    ) -> list[ScheduledSequence | None]:
        """Take the result of the oldest outstanding step: ``token_ids`` holds what each sequence
        drew. Returns the sequences, None in place of those that had ended before."""
        accepted: list[ScheduledSequence | None] = []
        for sequence, token_id in zip(step.sequences, token_ids, strict=True):
            request = sequence.request
            request.num_steps_in_flight -= 1
            if request.is_finished:
                accepted.append(None)
                continue
            accepted.append(sequence)
            request.num_scored_tokens += sequence.num_scored
            if token_id is not None:
                request.num_pending_samples -= 1
                request.token_ids.append(token_id)
            if sequence.admission == request.admission:  # not preempted meanwhile
                request.num_collected_tokens += sequence.num_tokens
                self.kv_cache.advance(request)
            if token_id is not None:
                self._check_stop(request, token_id)
            elif not request.max_tokens and sequence.end == request.num_prompt_tokens:
                self.finish(request, RequestStatus.LENGTH)
        self._release_late()
        return accepted

    def fail(self, step: ScheduledStep) -> list[Request]:
        """Take the failure of a step: its requests end. Returns those that had not ended before."""
        failed = []
        for sequence in step.sequences:
            request = sequence.request
            request.num_steps_in_flight -= 1
            if not request.is_finished:
                failed.append(request)
                self.finish(request, RequestStatus.FAILED)
        self._release_late()
        return failed

    def _check_stop(self, request: Request, token_id: int) -> None:
        if token_id in request.stop_token_ids:
            if token_id in request.sampling_params.stop_token_ids:
                request.stop_reason = token_id
            self.finish(request, RequestStatus.STOPPED)
        elif request.num_output_tokens >= request.max_tokens:
            self.finish(request, RequestStatus.LENGTH)

    # Running requests

    def _schedule_running(self, plan: _Plan) -> None:
        for request in sorted(self.running, key=_is_chunk):
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for one before it
            num_tokens = min(request.num_new_tokens, plan.budget)
            if num_tokens and self._extend_blocks(request, num_tokens, plan):
                plan.put(request, num_tokens)

    def _extend_blocks(self, request: Request, num_tokens: int, plan: _Plan) -> bool:
        """Give ``request`` the blocks of its next tokens, from others if it must be."""
        missing = self.kv_cache.missing_blocks(request, num_tokens)
        while not self.kv_cache.has_free(missing):
            plan.starved = True
            if self._released_late:
                return False  # a step in flight still holds blocks that are coming back
            victim = self.running[-1]
            if self.running[0] is victim and victim.num_steps_in_flight:
                return False  # its own step does: a window goes on from there
            plan.drop(victim)
            self._preempt(victim)
            if victim is request:
                return False
        self.kv_cache.extend(request, missing)
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting[request] = None
        self.waiting.move_to_end(request, last=False)

    # Waiting requests

    def _schedule_waiting(self, plan: _Plan) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs and plan.budget > 0:
            request = next(iter(self.waiting))
            if request.num_steps_in_flight or self._follows(request):
                return
            cached = self.kv_cache.prefix_cache.match(request)
            # A spare block for each running request: it would soon take the newcomer's otherwise.
            if not self.kv_cache.has_room(request, cached, spare=len(self.running)):
                return
            num_cached_tokens = len(cached[0]) * self.kv_cache.block_size
            num_tokens = min(request.num_tokens - num_cached_tokens, plan.budget)
            self._admit(request, cached, num_tokens)
            plan.admitted.append(request)
            plan.put(request, num_tokens)

    def _follows(self, request: Request) -> bool:
        """Whether the request's leader is still computing the prompt that they share."""
        leader = request.leader
        return (
            leader is not None
            and not leader.is_finished
            and leader.num_collected_tokens < leader.num_prompt_tokens
        )

    def _admit(self, request: Request, cached: BlockTables, num_tokens: int) -> None:
        del self.waiting[request]
        num_cached_tokens = len(cached[0]) * self.kv_cache.block_size
        self.kv_cache.admit(request, cached, num_tokens)
        request.num_computed_tokens = request.num_collected_tokens = num_cached_tokens
        if not request.num_preemptions:
            request.num_cached_tokens = num_cached_tokens
        request.leader = None
        request.slot = self._free_slots.pop()
        request.admission = self._num_admissions
        self._num_admissions += 1
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    # Blocks

    def _release(self, request: Request) -> None:
        """Take blocks and slot from a request that leaves ``running``."""
        if request.num_steps_in_flight:
            self._released_late.append((request, request.block_tables))
        else:
            self.kv_cache.release(request.block_tables)
        request.block_tables = []
        request.num_computed_tokens = request.num_collected_tokens = 0
        self._free_slots.append(request.slot)
        request.slot = request.admission = -1

    def _release_late(self) -> None:
        late, self._released_late = self._released_late, []
        for request, tables in late:
            if request.num_steps_in_flight:
                self._released_late.append((request, tables))
            else:
                self.kv_cache.release(tables)

    # The plan becomes a step

    def _commit(self, plan: _Plan) -> ScheduledStep:
        sequences = [self._enter(r, n) for r, n in plan.num_tokens.items()]
        sequences.sort(key=lambda sequence: sequence.num_tokens > 1)
        return ScheduledStep(tuple(sequences), tuple(plan.admitted))

    def _enter(self, request: Request, num_tokens: int) -> ScheduledSequence:
        start = request.num_computed_tokens
        end = start + num_tokens
        first_scored = num_scored = 0
        if request.sampling_params.prompt_logprobs is not None:
            first_scored = max(start, request.num_scored_tokens)
            num_scored = max(0, min(end, request.num_prompt_tokens - 1) - first_scored)
        sequence = ScheduledSequence(
            request=request,
            start=start,
            num_tokens=num_tokens,
            samples=end == request.num_tokens and request.max_tokens > 0,
            has_pending_input=end > len(request.token_ids),
            draw_index=request.num_tokens - request.num_prompt_tokens,
            first_scored=first_scored,
            num_scored=num_scored,
            slot=request.slot,
            admission=request.admission,
        )
        request.num_computed_tokens = end
        request.num_pending_samples += sequence.samples
        request.num_steps_in_flight += 1
        return sequence

    # Self-check

    def check_integrity(self) -> None:
        """Raise RuntimeError unless queues, slots, blocks and prefix cache agree."""
        late = [tables for _, tables in self._released_late]
        self.kv_cache.check_integrity(self.running, late)
        _require(all(r.status is RequestStatus.RUNNING for r in self.running), "status of running")
        _require(all(r.status is RequestStatus.WAITING for r in self.waiting), "status of waiting")
        order = [r.arrival for r in (*self.running, *self.waiting)]
        _require(order == sorted(order), "running and waiting are not in the order of arrival")
        slots = [*self._free_slots, *(r.slot for r in self.running)]
        _require(sorted(slots) == list(range(self.max_num_seqs)), "slots are lost or shared")
        for request in self.waiting:
            _require(not request.block_tables, f"{request.request_id} waits with blocks")


def _is_chunk(request: Request) -> bool:
    return request.num_new_tokens > 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"scheduler: {message}")
