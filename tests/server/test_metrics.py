"""Counters add up to what requests were answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rapshee_engine.engine.engine import Engine
from rapshee_engine.engine.stats import EngineStats
from rapshee_engine.errors import StepError
from rapshee_engine.sampling_params import SamplingParams
from rapshee_engine.server.metrics import metrics_registry
from rapshee_engine.server.registry import EngineRegistry
from reference.fake_runner import FakeRunner, make_engine

PROMPT = [(7 * i) % 200 for i in range(18)]


class Holder:
    """What a registry needs of an engine to show its numbers."""

    def __init__(self, stats: EngineStats) -> None:
        self.stats = stats


def registry_of(engines: Mapping[str, Any]) -> CollectorRegistry:
    return metrics_registry(EngineRegistry(engines, created=0, max_pending=1))


def samples(engine: Engine) -> dict[str, float]:
    """Value by name and labels as they are scraped, for the model ``m``."""
    text = generate_latest(registry_of({"m": Holder(engine.stats)})).decode()
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                assert sample.labels.pop("model_name") == "m"
                rest = ",".join(f"{key}={value}" for key, value in sample.labels.items())
                values[f"{sample.name}{{{rest}}}" if rest else sample.name] = sample.value
    return values


def run(engine: Engine, *prompts: list[int], **options: Any) -> list[Any]:
    """Events of requests that run together."""
    options = {"max_tokens": 8, "seed": 1, "ignore_eos": True, **options}
    for index, prompt in enumerate(prompts):
        prompt_ids = {"prompt_token_ids": prompt}
        engine.add_request(f"r{index}", prompt_ids, SamplingParams(**options))
    events = []
    while engine.has_unfinished:
        events += engine.step()
    return events


def test_answered_requests_add_up() -> None:
    engine = make_engine(max_num_batched_tokens=8)
    run(engine, PROMPT, [5] * 7, [6] * 30)
    run(engine, PROMPT, n=3, max_tokens=4)
    run(engine, PROMPT, prompt_logprobs=0, max_tokens=0)
    values = samples(engine)
    assert values["vllm:prompt_tokens_total"] == (18 + 7 + 30) + 18 + 18
    assert values["vllm:generation_tokens_total"] == 3 * 8 + 3 * 4
    assert values["vllm:request_success_total{finished_reason=length}"] == 3 + 3 + 1
    assert values["vllm:request_prompt_tokens_count"] == 7
    assert values["vllm:request_generation_tokens_sum"] == 3 * 8 + 3 * 4
    assert values["vllm:e2e_request_latency_seconds_count"] == 7
    assert values["vllm:request_queue_time_seconds_count"] == 7
    assert values["vllm:time_to_first_token_seconds_count"] == 3 + 1
    assert values["vllm:inter_token_latency_seconds_count"] == 3 * 7 + 3 * 3
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert values[f"vllm:{name}"] == 0


def test_prefix_hits_are_those_of_requests_that_looked() -> None:
    engine = make_engine()
    run(engine, PROMPT)
    run(engine, PROMPT)
    run(engine, PROMPT, prompt_logprobs=0)  # has to compute them all
    values = samples(engine)
    assert values["vllm:prefix_cache_queries_total"] == 18 + 18
    assert values["vllm:prefix_cache_hits_total"] == 16
    assert values["vllm:prompt_tokens_total"] == 3 * 18
    plain = make_engine(enable_prefix_caching=False)
    run(plain, PROMPT)
    assert samples(plain)["vllm:prefix_cache_queries_total"] == 0


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_reasons_are_those_of_the_answers(async_scheduling: bool) -> None:
    engine = make_engine(async_scheduling=async_scheduling)
    letters = {engine.tokenizer.encode(char)[0]: 100.0 for char in "ab"}
    text = run(engine, PROMPT, logit_bias=letters)[-1].outputs[0].text
    assert len(text) == 8
    reasons = []
    for stop in (text[2:4], text, text + "c"):
        events = run(engine, PROMPT, logit_bias=letters, stop=stop)
        reasons.append(events[-1].outputs[0].finish_reason)
    assert reasons == ["stop", "stop", "length"]
    values = samples(engine)
    assert values["vllm:request_success_total{finished_reason=stop}"] == 2
    assert values["vllm:request_success_total{finished_reason=length}"] == 2
    stopped_after = text.index(text[2:4]) + 2
    assert values["vllm:generation_tokens_total"] == 8 + stopped_after + 8 + 8


class LateDetokenizer:
    """Holds everything back; what comes at the end is a stop string."""

    stopped_by: str | None = None

    def push(self, _token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        self.stopped_by = "stop"
        return "text"


def test_a_stop_string_that_only_the_end_shows_is_a_stop() -> None:
    engine = make_engine()
    options = SamplingParams(max_tokens=4, ignore_eos=True)
    group = engine.input_processor.process("late", {"prompt_token_ids": PROMPT}, options)
    group.completions[0]._detokenizer = LateDetokenizer()  # type: ignore[assignment]
    engine.add(group)
    events = run(engine)
    output = events[-1].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("text", "stop", "stop")
    assert samples(engine)["vllm:request_success_total{finished_reason=stop}"] == 1


def test_aborted_requests_count_what_was_done() -> None:
    engine = make_engine(max_num_seqs=1, max_num_batched_tokens=32)
    for name in ("runs", "waits"):
        engine.add_request(name, {"prompt_token_ids": PROMPT}, SamplingParams(seed=1, n=2))
    for _ in range(3):
        engine.step()
    values = samples(engine)
    assert values["vllm:num_requests_running"] == 1
    assert values["vllm:num_requests_waiting"] == 3
    assert values["vllm:kv_cache_usage_perc"] == pytest.approx(len(PROMPT) // 4 / 64, abs=2 / 64)
    engine.abort("waits")
    engine.abort("runs")
    run(engine)
    values = samples(engine)
    assert values["vllm:request_success_total{finished_reason=abort}"] == 4
    assert values["vllm:prompt_tokens_total"] == 18
    assert values["vllm:generation_tokens_total"] == 3
    assert values["vllm:request_generation_tokens_sum"] == 3
    assert values["vllm:num_requests_running"] == values["vllm:num_requests_waiting"] == 0


def test_failures_and_preemptions_count() -> None:
    engine = make_engine(num_blocks=12, max_num_seqs=4)
    run(engine, [9] * 20, PROMPT, max_tokens=24)
    assert samples(engine)["vllm:num_preemptions_total"] > 0
    assert isinstance(engine.runner, FakeRunner)
    engine.runner.collect_errors[engine.stats.num_steps] = StepError("on demand")
    run(engine, PROMPT, n=2)
    values = samples(engine)
    assert values["vllm:request_success_total{finished_reason=error}"] == 2
    assert values["vllm:request_success_total{finished_reason=length}"] == 2


def test_a_dead_engine_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.add_request("a", {"prompt_token_ids": PROMPT}, SamplingParams())
    engine.step()
    monkeypatch.setattr(engine.scheduler, "schedule", lambda: 1 // 0)
    run(engine)
    values = samples(engine)
    assert values["vllm:num_requests_running"] == 0
    assert values["vllm:request_success_total{finished_reason=error}"] == 1


def test_histograms_are_cumulative() -> None:
    engine = make_engine()
    run(engine, [1], [1] * 5, [1] * 60, max_tokens=1)
    values = samples(engine)
    buckets = [
        values[f"vllm:request_prompt_tokens_bucket{{le={bound}}}"]
        for bound in ("1.0", "4.0", "16.0", "64.0", "128.0", "+Inf")
    ]
    assert buckets == [1, 1, 2, 3, 3, 3]
    assert values["vllm:request_prompt_tokens_sum"] == 66


def test_an_engine_is_shown_once_under_its_first_name() -> None:
    holder, other = Holder(EngineStats(prompt_tokens=3)), Holder(EngineStats(prompt_tokens=5))
    text = generate_latest(registry_of({"big": holder, "small": holder, "other": other})).decode()
    lines = [line for line in text.splitlines() if line.startswith("vllm:prompt_tokens_total")]
    assert lines == [
        'vllm:prompt_tokens_total{model_name="big"} 3.0',
        'vllm:prompt_tokens_total{model_name="other"} 5.0',
    ]
