from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from rapshee_engine.engine.engine import Engine, RequestFailure
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.errors import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    StepError,
)
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from reference.fake_runner import EOS, FakeRunner, make_engine

ASYNC = pytest.mark.parametrize("async_scheduling", [False, True])


def params(**options: Any) -> SamplingParams:
    options = {"max_tokens": 8, "seed": 1, "output_kind": RequestOutputKind.FINAL_ONLY, **options}
    return SamplingParams(**options)


def runner_of(engine: Engine) -> FakeRunner:
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner


def drain(engine: Engine, most_steps: int = 2000) -> list[RequestOutput | RequestFailure]:
    """Step until nothing is left, checking the bookkeeping after every step."""
    events = []
    for _ in range(most_steps):
        if not engine.has_unfinished:
            return events
        events += engine.step()
        engine.scheduler.check_integrity()
    raise AssertionError("requests do not end")


def outputs_of(engine: Engine) -> dict[str, RequestOutput]:
    """Final outputs by request id; no request may fail."""
    outputs = {}
    for event in drain(engine):
        assert isinstance(event, RequestOutput)
        if event.finished:
            outputs[event.request_id] = event
    assert engine.scheduler.kv_cache.usage == 0
    return outputs


def generate(
    engine: Engine, prompt: Sequence[int], options: SamplingParams, **extra: Any
) -> RequestOutput:
    engine.add_request("only", {"prompt_token_ids": list(prompt)}, options, **extra)
    return outputs_of(engine)["only"]


# What a request yields does not depend on its surroundings.

PROMPT = [(7 * i) % 200 for i in range(18)]
CASES = {
    "greedy": params(temperature=0.0, logprobs=3),
    "sampled": params(temperature=1.0, logprobs=1),
    "several": params(n=3, logprobs=0),
    "penalties": params(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5),
    "biased": params(logit_bias={5: 4.0, 6: -100.0}),
    "masked": params(allowed_token_ids=[3, 5, 8, EOS], min_tokens=4, max_tokens=12),
    "scored": params(prompt_logprobs=2),
}
SCORED_ALONE = params(prompt_logprobs=2, max_tokens=0)


def crowd(engine: Engine) -> None:
    """31 other requests, some with the beginning of `PROMPT`."""
    for i in range(31):
        prompt = PROMPT[: i % 17 + 1] + [i] * (i % 5)
        engine.add_request(f"other-{i}", {"prompt_token_ids": prompt}, params(seed=i, n=i % 2 + 1))


def alone(engine: Engine, options: SamplingParams) -> RequestOutput:
    return generate(engine, PROMPT, options)


def among_others(engine: Engine, options: SamplingParams) -> RequestOutput:
    crowd(engine)
    return generate(engine, PROMPT, options)


def late_among_others(engine: Engine, options: SamplingParams) -> RequestOutput:
    crowd(engine)
    for _ in range(7):
        engine.step()
    return generate(engine, PROMPT, options)


def after_the_same_prompt(engine: Engine, options: SamplingParams) -> RequestOutput:
    generate(engine, [*PROMPT, 1, 2], params())
    output = generate(engine, PROMPT, options)
    if engine.config.enable_prefix_caching and options.prompt_logprobs is None:
        assert output.num_cached_tokens > 0
    return output


def while_others_are_aborted(engine: Engine, options: SamplingParams) -> RequestOutput:
    crowd(engine)
    engine.add_request("only", {"prompt_token_ids": PROMPT}, options)
    final: list[RequestOutput] = []
    for i in range(31):
        final += [e for e in engine.step() if e.request_id == "only"]  # type: ignore[misc]
        engine.abort(f"other-{i}")
        engine.scheduler.check_integrity()
    return outputs_of(engine).get("only") or final[-1]


def preempted(engine: Engine, options: SamplingParams) -> RequestOutput:
    engine.add_request("first", {"prompt_token_ids": [9] * 20}, params(max_tokens=24))
    output = generate(engine, PROMPT, options)
    assert engine.stats.num_preemptions > 0
    return output


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[SamplingParams, RequestOutput]:
    options = CASES[request.param]
    return options, alone(make_engine(), options)


@ASYNC
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [9, 64])
@pytest.mark.parametrize(
    "scene",
    [alone, among_others, late_among_others, after_the_same_prompt, while_others_are_aborted],
)
def test_a_request_yields_the_same(
    case: tuple[SamplingParams, RequestOutput],
    scene: Callable[[Engine, SamplingParams], RequestOutput],
    budget: int,
    caching: bool,
    async_scheduling: bool,
) -> None:
    options, expected = case
    engine = make_engine(
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        async_scheduling=async_scheduling,
    )
    actual = scene(engine, options)
    assert actual.outputs == expected.outputs
    assert actual.prompt_logprobs == expected.prompt_logprobs


@ASYNC
@pytest.mark.parametrize("num_blocks", [12, 13])
def test_a_preempted_request_yields_the_same(
    case: tuple[SamplingParams, RequestOutput], num_blocks: int, async_scheduling: bool
) -> None:
    options, expected = case
    engine = make_engine(num_blocks=num_blocks, max_num_seqs=4, async_scheduling=async_scheduling)
    actual = preempted(engine, options)
    assert actual.outputs == expected.outputs
    assert actual.prompt_logprobs == expected.prompt_logprobs


@ASYNC
@pytest.mark.parametrize("budget", [2, 9, 64])
def test_a_prompt_is_scored_the_same(budget: int, async_scheduling: bool) -> None:
    expected = alone(make_engine(), SCORED_ALONE)
    assert expected.prompt_logprobs == alone(make_engine(), CASES["scored"]).prompt_logprobs
    for scene in (among_others, late_among_others, after_the_same_prompt):
        engine = make_engine(
            max_num_batched_tokens=budget, max_num_seqs=2, async_scheduling=async_scheduling
        )
        assert scene(engine, SCORED_ALONE).prompt_logprobs == expected.prompt_logprobs


@ASYNC
def test_a_preempted_prompt_is_scored_the_same(async_scheduling: bool) -> None:
    engine = make_engine(
        num_blocks=12, max_num_seqs=2, max_num_batched_tokens=2, async_scheduling=async_scheduling
    )
    actual, expected = preempted(engine, SCORED_ALONE), alone(make_engine(), SCORED_ALONE)
    assert actual.outputs == expected.outputs
    assert actual.prompt_logprobs == expected.prompt_logprobs


def test_completions_draw_with_consecutive_seeds() -> None:
    several = alone(make_engine(), params(n=3, seed=5)).outputs
    single = [alone(make_engine(), params(seed=5 + i)).outputs[0] for i in range(3)]
    assert [o.token_ids for o in several] == [o.token_ids for o in single]
    assert [o.index for o in several] == [0, 1, 2]


def test_completions_share_the_prompt() -> None:
    engine = make_engine()
    alone(engine, params(n=3))
    computed = sum(runner_of(engine).batch_sizes)
    assert engine.stats.prefix_cache_hits == 2 * 16
    assert computed < 3 * (len(PROMPT) + 8)


def test_the_largest_seed_has_a_successor() -> None:
    wrapped = alone(make_engine(), params(n=2, seed=(1 << 64) - 1)).outputs[1]
    assert wrapped.token_ids == alone(make_engine(), params(seed=0)).outputs[0].token_ids


def test_without_a_seed_draws_differ() -> None:
    tokens = {tuple(alone(make_engine(), params(seed=None)).outputs[0].token_ids) for _ in "ab"}
    assert len(tokens) == 2


# Ends


def text_of(token_ids: Sequence[int]) -> str:
    return make_engine().tokenizer.decode(token_ids)


def readable() -> SamplingParams:
    """Only lower-case letters."""
    letters = [make_engine().tokenizer.encode(chr(c))[0] for c in range(ord("a"), ord("z") + 1)]
    return params(allowed_token_ids=letters, max_tokens=20)


@ASYNC
def test_a_stop_string_ends_the_text_before_it(async_scheduling: bool) -> None:
    full = alone(make_engine(), readable()).outputs[0]
    stop = full.text[6:9]
    cut = full.text.index(stop)
    engine = make_engine(async_scheduling=async_scheduling)
    output = alone(engine, replace(readable(), stop=["no such text", stop])).outputs[0]
    assert output.text == full.text[:cut]
    assert output.token_ids == full.token_ids[: cut + 3]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_a_stop_string_can_be_kept() -> None:
    full = alone(make_engine(), readable()).outputs[0]
    stop = full.text[6:9]
    options = replace(readable(), stop=stop, include_stop_str_in_output=True)
    output = alone(make_engine(), options).outputs[0]
    assert output.text == full.text[: full.text.index(stop) + 3]


def test_a_stop_string_in_the_last_token_is_a_stop() -> None:
    full = alone(make_engine(), readable()).outputs[0]
    cut = full.text.index(full.text[6:9])
    options = replace(readable(), stop=full.text[6:9], max_tokens=cut + 3)
    assert alone(make_engine(), options).outputs[0].finish_reason == "stop"


@ASYNC
def test_end_of_sequence_is_a_token_but_no_text(async_scheduling: bool) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    output = alone(engine, params(logit_bias={EOS: 100.0})).outputs[0]
    assert (output.token_ids, output.text) == ([EOS], "")
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_end_of_sequence_can_be_ignored() -> None:
    output = alone(make_engine(), params(logit_bias={EOS: 100.0}, ignore_eos=True)).outputs[0]
    assert output.token_ids == [EOS] * 8
    assert output.finish_reason == "length"


def test_a_stop_token_ends_the_text_and_is_named() -> None:
    output = alone(make_engine(), params(logit_bias={70: 100.0}, stop_token_ids=[70])).outputs[0]
    assert (output.token_ids, output.text) == ([70], "")
    assert (output.finish_reason, output.stop_reason) == ("stop", 70)


@ASYNC
def test_no_end_before_min_tokens(async_scheduling: bool) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    options = params(logit_bias={EOS: 100.0, 70: 90.0}, stop_token_ids=[70], min_tokens=3)
    output = alone(engine, options).outputs[0]
    assert len(output.token_ids) == 4
    assert output.token_ids[-1] == EOS
    assert not {EOS, 70} & set(output.token_ids[:-1])


def test_only_allowed_tokens_are_drawn() -> None:
    output = alone(make_engine(), params(allowed_token_ids=[3, 5], logit_bias={9: 100.0}))
    assert set(output.outputs[0].token_ids) <= {3, 5}


def test_max_tokens_defaults_to_the_rest_of_the_context() -> None:
    output = alone(make_engine(max_position=30), params(max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 30 - len(PROMPT)
    assert output.outputs[0].finish_reason == "length"


def test_a_request_can_fill_the_whole_pool() -> None:
    output = alone(make_engine(num_blocks=8), params(max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 8 * 4 - len(PROMPT)


@ASYNC
def test_an_abort_takes_effect_within_two_steps(async_scheduling: bool) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    engine.add_request("a", {"prompt_token_ids": PROMPT}, params(max_tokens=40, n=2))
    for _ in range(4):
        engine.step()
    engine.abort("a")
    events = engine.step() + engine.step()
    assert not engine.has_unfinished
    assert engine.scheduler.kv_cache.usage == 0
    (output,) = events
    assert isinstance(output, RequestOutput)
    assert output.finished
    assert [o.finish_reason for o in output.outputs] == ["abort", "abort"]
    assert output.outputs[0].token_ids


def test_aborting_the_unknown_is_nothing() -> None:
    engine = make_engine()
    engine.abort("nobody")
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    ("asked", "is_asynchronous", "in_flight"),
    [(None, False, 0), (None, True, 1), (True, False, 1), (False, True, 0)],
)
def test_a_step_is_in_flight_where_the_device_is_asynchronous_or_as_asked(
    asked: bool | None, is_asynchronous: bool, in_flight: int
) -> None:
    engine = make_engine(async_scheduling=asked, is_asynchronous=is_asynchronous)
    engine.add_request("a", {"prompt_token_ids": PROMPT}, params(max_tokens=10))
    for _ in range(3):
        engine.step()
    assert len(engine._in_flight) == in_flight


# Log-probabilities


def test_logprobs_hold_the_token_and_the_most_likely() -> None:
    (output,) = alone(make_engine(), params(logprobs=3)).outputs
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids)
    for token_id, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(entries)) == token_id
        assert len(entries) in (3, 4)
        top = [e for e in entries.values() if e.rank <= 3]
        assert sorted(e.rank for e in top) == [1, 2, 3]
        ordered = sorted(entries.values(), key=lambda e: e.rank)
        values = [e.logprob for e in ordered]
        assert values == sorted(values, reverse=True)


def test_logprobs_of_zero_hold_the_token_alone_with_its_rank() -> None:
    (output,) = alone(make_engine(), params(logprobs=0, temperature=0.0)).outputs
    assert output.logprobs is not None
    assert [list(entries) for entries in output.logprobs] == [[t] for t in output.token_ids]
    assert all(e.rank == 1 for entries in output.logprobs for e in entries.values())


def test_logprobs_show_tokens_as_text_and_bytes() -> None:
    (output,) = alone(make_engine(), params(logprobs=0)).outputs
    assert output.logprobs is not None
    for token_id, entries in zip(output.token_ids, output.logprobs, strict=True):
        entry = entries[token_id]
        assert entry.token_bytes == make_engine().tokenizer.token_bytes(token_id)
        assert entry.decoded_token == entry.token_bytes.decode("utf-8", "replace")


@pytest.mark.parametrize("budget", [8, 64])
def test_prompt_logprobs_cover_the_prompt(budget: int) -> None:
    engine = make_engine(max_num_batched_tokens=budget)
    output = alone(engine, params(prompt_logprobs=2, n=2))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [next(iter(e)) for e in output.prompt_logprobs if e is not None] == PROMPT[1:]
    assert output.num_cached_tokens == 0
    assert engine.stats.prefix_cache_hits == 16  # the second completion's


@ASYNC
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 9, 64])
def test_without_tokens_to_generate_only_the_prompt_is_computed(
    length: int, n: int, async_scheduling: bool
) -> None:
    engine = make_engine(max_num_batched_tokens=8, async_scheduling=async_scheduling)
    prompt = [i % 200 for i in range(length)]
    output = generate(engine, prompt, params(max_tokens=0, prompt_logprobs=1, n=n))
    assert [(o.token_ids, o.text, o.finish_reason) for o in output.outputs] == [
        ([], "", "length")
    ] * n
    assert output.prompt_logprobs is not None
    assert [next(iter(e)) for e in output.prompt_logprobs if e is not None] == prompt[1:]
    assert engine.stats.generation_tokens == 0
    assert engine.stats.finished["length"] == n


def test_without_tokens_to_generate_the_prefix_cache_is_filled() -> None:
    engine = make_engine()
    (event,) = stream_of(engine, RequestOutputKind.DELTA, max_tokens=0)
    assert (event.finished, event.prompt_logprobs) == (True, None)
    assert alone(engine, params()).num_cached_tokens == 16


@ASYNC
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_a_prompt_that_cannot_be_scored_is_a_failure(
    max_tokens: int, async_scheduling: bool
) -> None:
    engine = make_engine(async_scheduling=async_scheduling, max_num_batched_tokens=8)
    runner_of(engine).unsamplable_seeds.add(0)  # that of rows which score
    options = params(prompt_logprobs=0, max_tokens=max_tokens)
    engine.add_request("broken", {"prompt_token_ids": PROMPT}, options)
    (failure,) = drain(engine)
    assert isinstance(failure, RequestFailure)
    assert "not finite" in str(failure.error)
    assert engine.stats.finished == {"stop": 0, "length": 0, "abort": 0, "error": 1}


# Streams


def stream_of(engine: Engine, kind: RequestOutputKind, **options: Any) -> list[RequestOutput]:
    engine.add_request("only", {"prompt_token_ids": PROMPT}, params(output_kind=kind, **options))
    events = drain(engine)
    assert all(isinstance(event, RequestOutput) for event in events)
    return events  # type: ignore[return-value]


def stream(kind: RequestOutputKind, **options: Any) -> list[RequestOutput]:
    return stream_of(make_engine(), kind, **options)


@pytest.mark.parametrize("n", [1, 3])
def test_deltas_add_up_to_the_whole(n: int) -> None:
    (whole,) = stream(RequestOutputKind.FINAL_ONLY, n=n, logprobs=1, prompt_logprobs=1)
    deltas = stream(RequestOutputKind.DELTA, n=n, logprobs=1, prompt_logprobs=1)
    for index, expected in enumerate(whole.outputs):
        parts = [o for event in deltas for o in event.outputs if o.index == index]
        assert "".join(o.text for o in parts) == expected.text
        assert [t for o in parts for t in o.token_ids] == expected.token_ids
        assert [e for o in parts for e in o.logprobs or ()] == expected.logprobs
        assert [o.finish_reason for o in parts] == [None] * (len(parts) - 1) + ["length"]
        assert parts[-1].num_tokens == len(expected.token_ids)
    assert [event.finished for event in deltas] == [False] * (len(deltas) - 1) + [True]
    assert [e.prompt_logprobs for e in deltas if e.prompt_logprobs] == [whole.prompt_logprobs]


def test_cumulative_outputs_grow_to_the_whole() -> None:
    (whole,) = stream(RequestOutputKind.FINAL_ONLY)
    outputs = stream(RequestOutputKind.CUMULATIVE)
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(range(1, 9))
    assert outputs[-1] == whole


# Failures


@ASYNC
@pytest.mark.parametrize("where", ["launch_errors", "collect_errors"])
def test_a_failed_step_ends_its_requests_and_no_others(where: str, async_scheduling: bool) -> None:
    engine = make_engine(async_scheduling=async_scheduling, max_num_seqs=2)
    for name in "abc":
        engine.add_request(name, {"prompt_token_ids": PROMPT}, params())
    getattr(runner_of(engine), where)[3] = StepError("on demand")
    events = drain(engine)
    failures = [e for e in events if isinstance(e, RequestFailure)]
    assert {f.request_id for f in failures} == {"a", "b"}
    assert all(isinstance(f.error, StepError) for f in failures)
    (output,) = (e for e in events if isinstance(e, RequestOutput))
    assert output.outputs == alone(make_engine(), params()).outputs
    assert engine.scheduler.kv_cache.usage == 0
    assert engine.dead is None


@ASYNC
def test_any_exception_of_a_step_is_a_failed_step(async_scheduling: bool) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    engine.add_request("a", {"prompt_token_ids": PROMPT}, params(n=2))
    runner_of(engine).collect_errors[1] = ZeroDivisionError("a bug")
    (failure,) = drain(engine)
    assert isinstance(failure, RequestFailure)
    assert isinstance(failure.error, StepError)
    assert isinstance(failure.error.__cause__, ZeroDivisionError)
    assert alone(engine, params()).outputs == alone(make_engine(), params()).outputs


@ASYNC
@pytest.mark.parametrize("where", ["launch_errors", "collect_errors"])
def test_a_dead_runner_ends_everything(where: str, async_scheduling: bool) -> None:
    engine = make_engine(async_scheduling=async_scheduling, max_num_seqs=1)
    for name in "ab":
        engine.add_request(name, {"prompt_token_ids": PROMPT}, params())
    getattr(runner_of(engine), where)[2] = EngineDeadError("the device is gone")
    failures = drain(engine)
    assert {f.request_id for f in failures} == {"a", "b"}
    assert all(isinstance(f, RequestFailure) for f in failures)
    assert all(isinstance(f.error, EngineDeadError) for f in failures)  # type: ignore[union-attr]
    with pytest.raises(EngineDeadError, match="the device is gone"):
        engine.add_request("c", {"prompt_token_ids": PROMPT}, params())
    engine.close()
    assert runner_of(engine).is_closed


class BrokenDetokenizer:
    def push(self, token_ids: Sequence[int]) -> str:
        raise ZeroDivisionError(f"no text for {token_ids}")

    def finish(self) -> str:
        return ""


def test_text_that_cannot_be_made_concerns_its_request_alone() -> None:
    engine = make_engine()
    prompt = {"prompt_token_ids": PROMPT}
    group = engine.input_processor.process("broken", prompt, params(n=2))
    group.completions[1]._detokenizer = BrokenDetokenizer()  # type: ignore[assignment]
    engine.add(group)
    engine.add_request("good", prompt, params())
    failure, output = sorted(drain(engine), key=lambda event: event.request_id)
    assert isinstance(failure, RequestFailure)
    assert isinstance(failure.error.__cause__, ZeroDivisionError)
    assert isinstance(output, RequestOutput)
    assert output.outputs == alone(make_engine(), params()).outputs
    assert engine.dead is None


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_logits_that_are_not_finite_concern_their_request_alone(async_scheduling: bool) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    runner_of(engine).unsamplable_seeds.add(13)
    prompt = {"prompt_token_ids": PROMPT}
    engine.add_request("broken", prompt, params(seed=13))
    engine.add_request("good", prompt, params())
    failure, output = sorted(drain(engine), key=lambda event: event.request_id)
    assert isinstance(failure, RequestFailure)
    assert isinstance(failure.error, StepError)
    assert "not finite" in str(failure.error)
    assert isinstance(output, RequestOutput)
    assert output.outputs == alone(make_engine(), params()).outputs
    assert engine.dead is None


def test_a_bug_in_the_loop_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.add_request("a", {"prompt_token_ids": PROMPT}, params())
    monkeypatch.setattr(engine.scheduler, "schedule", lambda: 1 // 0)
    (failure,) = drain(engine)
    assert isinstance(failure, RequestFailure)
    assert isinstance(engine.dead, EngineDeadError)


# The rest


def test_salts_keep_prefixes_apart() -> None:
    engine = make_engine()
    assert generate(engine, PROMPT, params(), cache_salt="a").num_cached_tokens == 0
    assert generate(engine, PROMPT, params(), cache_salt="b").num_cached_tokens == 0
    assert generate(engine, PROMPT, params(), cache_salt="a").num_cached_tokens == 16


def test_an_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add_request("a", {"prompt_token_ids": PROMPT}, params())
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.add_request("a", {"prompt_token_ids": PROMPT}, params())
    assert list(outputs_of(engine)) == ["a"]


def test_a_closed_engine_takes_no_requests() -> None:
    engine = make_engine()
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.add_request("a", {"prompt_token_ids": PROMPT}, params())


def test_chat_uses_the_template() -> None:
    engine = make_engine()
    ids = engine.render_chat([{"role": "user", "content": "hi"}])
    assert ids[0] == EOS + 1
    text = engine.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|start|>user: hi<|end|><|start|>assistant: "


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        make_engine(has_chat_template=False).render_chat([{"role": "user", "content": "hi"}])


def test_a_context_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        make_engine(max_position=64, max_model_len=65)


def test_the_fingerprint_is_that_of_the_runner() -> None:
    engine = make_engine()
    assert engine.fingerprint.startswith("fp_")
    assert engine.fingerprint == make_engine().fingerprint
    runner_of(engine).identity = "other weights"
    assert engine.fingerprint != make_engine().fingerprint


def test_stats_count() -> None:
    engine = make_engine()
    for _ in range(2):
        generate(engine, PROMPT, params(n=2))
    stats = engine.stats
    assert stats.prompt_tokens == 2 * len(PROMPT)
    assert stats.generation_tokens == 2 * 2 * 8
    assert stats.finished == {"stop": 0, "length": 4, "abort": 0, "error": 0}
    assert stats.time_to_first_token.count == 2
    assert stats.queue_time.count == 2 * 2
    assert stats.prefix_cache_queries == 2 * 2 * len(PROMPT)
    assert stats.inter_token_latency.count == 2 * 2 * 7
    assert stats.request_generation_tokens.total == 32
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
