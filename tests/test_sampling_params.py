from __future__ import annotations

import math
from typing import Any

import pytest

from rapshee_engine.errors import InvalidRequestError
from rapshee_engine.sampling_params import SamplingParams

GOOD: list[tuple[str, Any]] = [
    ("n", 1),
    ("n", 128),
    ("max_tokens", 1),
    ("max_tokens", None),
    ("min_tokens", 16),
    ("temperature", 0),
    ("temperature", 2),
    ("top_k", -1),
    ("top_k", 0),
    ("top_p", 1e-9),
    ("top_p", 1),
    ("min_p", 0),
    ("min_p", 1),
    ("repetition_penalty", 10),
    ("presence_penalty", -2),
    ("frequency_penalty", 2),
    ("logit_bias", {0: -100, 7: 100.0}),
    ("allowed_token_ids", [0]),
    ("seed", -(1 << 63)),
    ("seed", (1 << 64) - 1),
    ("stop", "end"),
    ("stop", ["end", "stop"]),
    ("stop", []),
    ("stop", None),
    ("stop_token_ids", None),
    ("logit_bias", None),
    ("stop_token_ids", list(range(128))),
    ("logprobs", 0),
    ("logprobs", 20),
    ("prompt_logprobs", 20),
    ("max_tokens", 0),
]
BAD: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 129),
    ("n", 1.0),
    ("n", True),
    ("max_tokens", -1),
    ("max_tokens", 1 << 64),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "1"),
    ("temperature", None),
    ("top_k", -2),
    ("top_k", 1 << 31),
    ("top_k", 1.5),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", math.nan),
    ("repetition_penalty", 0),
    ("repetition_penalty", math.nan),
    ("presence_penalty", 2.1),
    ("presence_penalty", math.nan),
    ("frequency_penalty", -2.1),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {"5": 0.0}),
    ("logit_bias", {5: 101}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", [5]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", 5),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", [1.0]),
    ("seed", 1 << 64),
    ("seed", -(1 << 63) - 1),
    ("seed", 1.0),
    ("stop", ""),
    ("stop", ["end", ""]),
    ("stop", 5),
    ("stop", [5]),
    ("stop_token_ids", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", list(range(129))),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 21),
    ("ignore_eos", "no"),
    ("include_stop_str_in_output", 1),
    ("skip_special_tokens", None),
    ("output_kind", "delta"),
]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_the_ends_of_the_ranges_are_good(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param is not None
    assert caught.value.param.split(".")[0] == name


def test_it_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams(temperature=math.nan)


def test_stop_becomes_a_tuple() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams().stop == ()


def test_none_is_nothing() -> None:
    nothing: Any = None
    params = SamplingParams(stop=nothing, stop_token_ids=nothing, logit_bias=nothing)
    assert params == SamplingParams()


def test_later_changes_to_its_arguments_do_not_reach_it() -> None:
    allowed, bias = [5], {5: 1.0}
    params = SamplingParams(allowed_token_ids=allowed, logit_bias=bias)
    allowed.append(-1)
    bias[-1] = 0.0
    assert params == SamplingParams(allowed_token_ids=[5], logit_bias={5: 1.0})


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=0.1).is_greedy


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
    ],
)
def test_penalties_need_counts(options: dict[str, float], expected: bool) -> None:
    assert SamplingParams(**options).uses_penalties == expected  # type: ignore[arg-type]
