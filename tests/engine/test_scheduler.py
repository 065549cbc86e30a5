from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from rapshee_engine.engine.batch_builder import BatchBuilder
from rapshee_engine.engine.kv_cache import KVGroup
from rapshee_engine.engine.request import Request, RequestStatus
from rapshee_engine.engine.scheduler import ScheduledStep, Scheduler
from rapshee_engine.errors import StepError
from rapshee_engine.sampling_params import SamplingParams
from reference.fake_runner import FakeRunner, greedy_continuation

BLOCK = 4


def make_scheduler(
    num_blocks: int = 16, groups: Sequence[KVGroup] = (), **options: Any
) -> Scheduler:
    options = {
        "kv_groups": groups or [KVGroup(num_blocks)],
        "block_size": BLOCK,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        **options,
    }
    return Scheduler(**options)


def make_request(name: str, tokens: list[int], max_tokens: int = 4, **options: Any) -> Request:
    return Request(name, tokens, SamplingParams(), max_tokens=max_tokens, **options)


def run_step(scheduler: Scheduler, token_id: int = 9) -> dict[str, int]:
    """One step, whose samples are all ``token_id``. Returns tokens computed by request."""
    step = scheduler.schedule()
    assert step is not None
    draw(scheduler, step, token_id)
    scheduler.check_integrity()
    return {s.request.request_id: s.num_tokens for s in step.sequences}


def draw(scheduler: Scheduler, step: ScheduledStep, token_id: int = 9) -> None:
    scheduler.update(step, [token_id if s.samples else None for s in step.sequences])


def test_an_idle_scheduler_has_nothing_to_launch() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished


def test_a_prompt_is_computed_in_chunks_and_then_decoded() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5)
    scheduler.add(make_request("a", list(range(12)), max_tokens=3))
    assert [run_step(scheduler) for _ in range(5)] == [{"a": n} for n in (5, 5, 2, 1, 1)]
    assert not scheduler.has_unfinished
    assert scheduler.kv_cache.pools[0].num_free == 16


def test_decodes_come_first_and_chunks_take_the_rest() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request("a", [1, 2], max_tokens=9))
    run_step(scheduler)
    scheduler.add(make_request("b", list(range(12))))
    step = scheduler.schedule()
    assert step is not None
    assert [(s.request.request_id, s.num_tokens) for s in step.sequences] == [("a", 1), ("b", 5)]
    assert [s.samples for s in step.sequences] == [True, False]


def test_sequences_with_one_token_come_first_whatever_they_are() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3]))
    scheduler.add(make_request("b", [1]))
    step = scheduler.schedule()
    assert step is not None
    assert [s.request.request_id for s in step.sequences] == ["b", "a"]


def test_at_most_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, [1, 2], max_tokens=2))
    assert run_step(scheduler) == {"a": 2, "b": 2}
    assert run_step(scheduler) == {"a": 1, "b": 1}
    assert run_step(scheduler) == {"c": 2}


def test_it_ends_at_max_tokens_and_at_a_stop_token() -> None:
    scheduler = make_scheduler()
    a = make_request("a", [1, 2], max_tokens=2, stop_token_ids=frozenset({7}))
    b = make_request("b", [1, 2], max_tokens=2)
    scheduler.add(a)
    scheduler.add(b)
    run_step(scheduler, token_id=7)
    assert (a.status, b.status) == (RequestStatus.STOPPED, RequestStatus.RUNNING)
    assert a.stop_reason is None  # end-of-sequence, not one of the request's own
    run_step(scheduler, token_id=7)
    assert b.status is RequestStatus.LENGTH


def test_the_prefix_of_a_finished_request_is_reused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", list(range(9)), max_tokens=1))
    run_step(scheduler)
    b = make_request("b", list(range(9)), max_tokens=1)
    scheduler.add(b)
    assert run_step(scheduler) == {"b": 1}
    assert b.num_cached_tokens == 8


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3], max_tokens=6))
    while scheduler.has_unfinished:
        run_step(scheduler)
    scheduler.add(make_request("b", [1, 2, 3, 9, 9, 9, 9, 9, 5], max_tokens=1))
    assert run_step(scheduler) == {"b": 1}


def test_the_last_to_arrive_is_preempted_and_goes_on_where_it_was() -> None:
    scheduler = make_scheduler(num_blocks=4, enable_prefix_caching=False)
    a = make_request("a", [1, 2, 3], max_tokens=9)
    b = make_request("b", [1, 2, 3], max_tokens=9)
    scheduler.add(a)
    scheduler.add(b)
    while not scheduler.num_preemptions:
        run_step(scheduler)
    assert list(scheduler.waiting) == [b]
    generated = b.num_output_tokens
    assert generated > 0
    while not a.is_finished:
        assert set(run_step(scheduler)) == {"a"}
    assert run_step(scheduler) == {"b": 3 + generated}
    assert b.num_output_tokens == generated + 1


def test_a_preempted_request_comes_before_later_ones() -> None:
    scheduler = make_scheduler(num_blocks=4)
    for name in "abc":
        scheduler.add(make_request(name, [1, 2, 3], max_tokens=9))
    while not scheduler.num_preemptions:
        run_step(scheduler)
    assert [r.request_id for r in scheduler.waiting] == ["b", "c"]


def test_followers_wait_for_their_leader_and_share_its_blocks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32)
    leader = make_request("a", list(range(9)))
    follower = make_request("b", list(range(9)), leader=leader)
    scheduler.add(leader)
    scheduler.add(follower)
    assert run_step(scheduler) == {"a": 9}
    assert run_step(scheduler) == {"a": 1, "b": 1}
    assert follower.num_cached_tokens == 8


def test_a_follower_does_not_wait_for_a_leader_that_has_gone() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5)
    leader = make_request("a", list(range(9)))
    scheduler.add(leader)
    scheduler.add(make_request("b", list(range(9)), leader=leader))
    run_step(scheduler)
    scheduler.finish(leader, RequestStatus.ABORTED)
    assert "b" in run_step(scheduler)


def test_what_never_fits_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.add(make_request("a", [1] * 4, max_tokens=4))
    with pytest.raises(ValueError, match="never fit"):
        scheduler.add(make_request("b", [1] * 5, max_tokens=4))


# With a step in flight


def test_a_step_can_be_built_on_pending_samples() -> None:
    scheduler = make_scheduler()
    a = make_request("a", [1, 2, 3], max_tokens=2)
    scheduler.add(a)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None
    assert second is not None
    assert [s.has_pending_input for s in (*first.sequences, *second.sequences)] == [False, True]
    assert [s.draw_index for s in (*first.sequences, *second.sequences)] == [0, 1]
    assert scheduler.schedule() is None  # both tokens are on their way
    draw(scheduler, first)
    draw(scheduler, second)
    assert a.status is RequestStatus.LENGTH


def test_blocks_stay_referenced_until_the_last_step_that_reads_them_is_collected() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3], max_tokens=4, stop_token_ids=frozenset({9})))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    draw(scheduler, first, token_id=9)
    assert not scheduler.has_unfinished
    assert scheduler.kv_cache.pools[0].num_free == 15
    scheduler.check_integrity()
    assert scheduler.update(second, [5]) == [None]
    assert scheduler.kv_cache.pools[0].num_free == 16


def test_a_block_is_cached_only_when_its_step_was_collected() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", list(range(9))))
    step = scheduler.schedule()
    assert step is not None
    assert len(scheduler.kv_cache.prefix_cache) == 0
    draw(scheduler, step)
    assert len(scheduler.kv_cache.prefix_cache) == 2


def test_blocks_of_a_failed_step_are_never_cached() -> None:
    scheduler = make_scheduler()
    a = make_request("a", list(range(9)))
    scheduler.add(a)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert scheduler.fail(first) == [a]
    assert scheduler.update(second, [5]) == [None]
    assert len(scheduler.kv_cache.prefix_cache) == 0
    assert scheduler.kv_cache.pools[0].num_free == 16


def test_a_launch_that_fails_frees_nothing_that_the_step_before_reads() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", list(range(9))))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    scheduler.fail(second)
    assert scheduler.kv_cache.pools[0].num_free == 13
    scheduler.check_integrity()
    draw(scheduler, first)
    assert scheduler.kv_cache.pools[0].num_free == 16


def test_an_aborted_request_leaves_with_the_steps_that_hold_it() -> None:
    scheduler = make_scheduler()
    a = make_request("a", [1, 2, 3])
    scheduler.add(a)
    step = scheduler.schedule()
    assert step is not None
    scheduler.finish(a, RequestStatus.ABORTED)
    assert scheduler.schedule() is None
    draw(scheduler, step)
    assert a.num_output_tokens == 0
    assert scheduler.kv_cache.pools[0].num_free == 16


# Windows


def test_a_window_waits_for_its_own_step_rather_than_be_preempted() -> None:
    scheduler = make_scheduler(groups=[KVGroup(5, window=9)], max_num_batched_tokens=8)
    scheduler.add(make_request("a", list(range(40))))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    draw(scheduler, first)
    # Tokens 0 to 15 are still seen by the step in flight: four blocks, and two more are wanted.
    assert scheduler.schedule() is None
    draw(scheduler, second)
    assert run_step(scheduler) == {"a": 8}
    assert scheduler.num_preemptions == 0


def test_an_older_request_takes_the_blocks_of_a_window_from_a_younger_one() -> None:
    groups = [KVGroup(30), KVGroup(6, window=9)]
    scheduler = make_scheduler(groups=groups, max_num_batched_tokens=8)
    scheduler.add(make_request("a", list(range(30)), max_tokens=8))
    scheduler.add(make_request("b", [1], max_tokens=12))
    while scheduler.has_unfinished:
        run_step(scheduler)
    assert scheduler.kv_cache.usage == 0


def test_a_request_that_no_window_could_hold_is_refused() -> None:
    groups = [KVGroup(30), KVGroup(4, window=9)]
    scheduler = make_scheduler(groups=groups, max_num_batched_tokens=8)
    scheduler.add(make_request("a", [1] * 12, max_tokens=4))
    with pytest.raises(ValueError, match="can never fit"):
        scheduler.add(make_request("b", [1] * 12, max_tokens=5))


def test_a_preempted_request_needs_no_more_than_its_window() -> None:
    """Of 60 tokens it holds a window and a step again."""
    scheduler = make_scheduler(groups=[KVGroup(5, window=9)], max_num_batched_tokens=8)
    request = make_request("a", [1] * 60, max_tokens=3)
    scheduler.add(request)
    for _ in range(8):
        run_step(scheduler)
    scheduler._preempt(request)
    scheduler.check_integrity()
    while scheduler.has_unfinished:
        run_step(scheduler)
    assert request.num_preemptions == 1
    assert request.num_output_tokens == 3


# Everything at once

VOCAB = 6
STOP = 0


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps, failures and aborts, on small pools of layers with and without
    windows: the bookkeeping stays whole, nothing is read that was not written, everything ends, and
    every request that was left alone has the tokens that its prompt alone determines."""

    @initialize(
        groups=st.lists(
            st.builds(
                KVGroup, st.integers(4, 12), st.sampled_from([0, 0, 1, 2, 3, 4, 5, 8, 9, 13])
            ),
            min_size=1,
            max_size=3,
        ),
        max_num_seqs=st.integers(1, 4),
        extra_budget=st.integers(0, 12),
        caching=st.booleans(),
    )
    def start(
        self, groups: list[KVGroup], max_num_seqs: int, extra_budget: int, caching: bool
    ) -> None:
        budget = max_num_seqs + extra_budget
        self.windows = [group.window for group in groups]
        self.scheduler = make_scheduler(
            groups=groups,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
        )
        self.runner = FakeRunner(
            num_blocks=[group.num_blocks for group in groups],
            windows=self.windows,
            block_size=BLOCK,
            max_num_tokens=budget,
            max_num_seqs=max_num_seqs,
            vocab_size=VOCAB,
        )
        self.builder = BatchBuilder(
            vocab_size=VOCAB,
            block_size=BLOCK,
            num_kv_groups=len(groups),
            max_num_seqs=max_num_seqs,
            max_blocks_per_seq=20,
        )
        self.capacity = min(self.scheduler.kv_cache.max_sequence_tokens, 80)
        self.requests: list[Request] = []
        self.in_flight: list[tuple[ScheduledStep, int]] = []

    @rule(
        length=st.integers(1, 48),
        alphabet=st.integers(1, 2),
        max_tokens=st.integers(1, 12),
        salt=st.sampled_from(["", "x"]),
        penalty=st.booleans(),
        follow=st.booleans(),
    )
    def add(
        self, length: int, alphabet: int, max_tokens: int, salt: str, penalty: bool, follow: bool
    ) -> None:
        length = min(length, self.capacity - max_tokens)  # of the smallest pool, 4 at least
        prompt = [1 + i % alphabet for i in range(length)]
        request = Request(
            str(len(self.requests)),
            prompt,
            SamplingParams(temperature=0.0, presence_penalty=0.5 if penalty else 0.0),
            max_tokens=max_tokens,
            stop_token_ids=frozenset({STOP}),
            cache_salt=salt,
            leader=self.requests[-1] if follow and self.requests else None,
        )
        self.scheduler.add(request)
        self.requests.append(request)

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule(fails=st.sampled_from([False] * 9 + [True]))
    def launch(self, fails: bool) -> None:
        step = self.scheduler.schedule()
        if step is None:
            return
        batch = self.builder.build(step)
        for request in step.admitted:
            if request.sampling_params.uses_penalties:
                token_ids = np.array(request.token_ids, np.int32)
                self.runner.set_state(request.slot, token_ids, request.num_prompt_tokens)
        if fails:
            self.scheduler.fail(step)
        else:
            self.in_flight.append((step, self.runner.launch(batch.step_input)))

    @precondition(lambda self: self.in_flight)
    @rule(fails=st.sampled_from([False] * 9 + [True]))
    def collect(self, fails: bool) -> None:
        step, ticket = self.in_flight.pop(0)
        if fails:
            self.runner.collect_errors[ticket] = StepError("on demand")
            with pytest.raises(StepError):
                self.runner.collect(ticket)
            self.scheduler.fail(step)
            return
        tokens = iter(self.runner.collect(ticket).token_ids.tolist())
        self.scheduler.update(step, [next(tokens) if s.samples else None for s in step.sequences])

    @precondition(lambda self: self.requests)
    @rule(index=st.integers(0, 1 << 16))
    def abort(self, index: int) -> None:
        request = self.requests[index % len(self.requests)]
        if not request.is_finished:
            self.scheduler.finish(request, RequestStatus.ABORTED)

    @invariant()
    def is_whole(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Every step computes a token of the oldest request, or waits for one in flight; a
        # preemption costs at most the tokens that were computed.
        for _ in range(4 * sum(r.num_prompt_tokens + r.max_tokens for r in self.requests) + 8):
            if not (self.scheduler.has_unfinished or self.in_flight):
                break
            if len(self.in_flight) < 2:
                self.launch(False)
            if self.in_flight:
                self.collect(False)
            self.scheduler.check_integrity()
        assert not self.scheduler.has_unfinished
        assert self.scheduler.kv_cache.usage == 0
        for request in self.requests:
            self._check_tokens(request)

    def _check_tokens(self, request: Request) -> None:
        prompt = request.token_ids[: request.num_prompt_tokens]
        output = request.token_ids[request.num_prompt_tokens :]
        expected = greedy_continuation(
            prompt,
            request.max_tokens,
            vocab_size=VOCAB,
            stop=STOP,
            presence_penalty=request.sampling_params.presence_penalty,
            windows=self.windows,
        )
        assert output == expected[: len(output)]
        if request.status in (RequestStatus.STOPPED, RequestStatus.LENGTH):
            assert output == expected
            assert (output[-1] == STOP) == (request.status is RequestStatus.STOPPED)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, report_multiple_bugs=False
)
