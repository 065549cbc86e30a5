from __future__ import annotations

import pytest

from rapshee_engine.engine.request import Request, RequestStatus
from rapshee_engine.sampling_params import SamplingParams


def test_a_new_request_waits_with_its_prompt_to_compute() -> None:
    request = Request("r", [5, 6, 7], SamplingParams(), max_tokens=2)
    assert request.status is RequestStatus.WAITING
    assert (request.num_prompt_tokens, request.num_output_tokens) == (3, 0)
    assert request.num_new_tokens == 3


def test_pending_samples_are_tokens_to_compute() -> None:
    request = Request("r", [5, 6, 7], SamplingParams(), max_tokens=2)
    request.num_computed_tokens = 3
    request.num_pending_samples = 1
    assert request.num_tokens == 4
    assert request.num_new_tokens == 1


def test_nothing_is_left_to_compute_when_the_last_token_is_pending() -> None:
    request = Request("r", [5, 6, 7], SamplingParams(), max_tokens=2)
    request.token_ids.append(8)
    request.num_computed_tokens = 4
    request.num_pending_samples = 1
    assert request.num_new_tokens == 0


def test_the_prompt_of_the_caller_is_not_changed() -> None:
    prompt = [5, 6, 7]
    Request("r", prompt, SamplingParams(), max_tokens=2).token_ids.append(8)
    assert prompt == [5, 6, 7]


def test_prompt_logprobs_skip_the_prefix_cache() -> None:
    params = SamplingParams(prompt_logprobs=0)
    assert not Request("r", [1], params, max_tokens=1).use_prefix_cache
    assert Request("r", [1], SamplingParams(), max_tokens=1).use_prefix_cache


@pytest.mark.parametrize("status", RequestStatus)
def test_only_waiting_and_running_are_unfinished(status: RequestStatus) -> None:
    unfinished = {RequestStatus.WAITING, RequestStatus.RUNNING}
    assert status.is_finished == (status not in unfinished)
