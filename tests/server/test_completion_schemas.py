"""Which text-completion requests are accepted, and what the refusals name."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapshee_engine.sampling_params import RequestOutputKind
from rapshee_engine.server.completion_schemas import (
    CompletionRequest,
    GivenPrompt,
    parse_completion_request,
)
from rapshee_engine.server.errors import ApiError
from rapshee_engine.server.fields import UnknownFieldLog


def parse(**fields: Any) -> CompletionRequest:
    body = {"model": "m", "prompt": "hi", **fields}
    return parse_completion_request(json.dumps(body).encode(), UnknownFieldLog())


def refused(**fields: Any) -> str | None:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value.param


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [("prompt", "a")]),
        ("", [("prompt", "")]),
        (["a", "b"], [("prompt.0", "a"), ("prompt.1", "b")]),
        ([1, 2], [("prompt", [1, 2])]),
        ([[1, 2], [3]], [("prompt.0", [1, 2]), ("prompt.1", [3])]),
    ],
)
def test_the_forms_of_a_prompt(prompt: Any, expected: list[tuple[str, Any]]) -> None:
    assert parse(prompt=prompt).prompts() == [GivenPrompt(*item) for item in expected]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (5, "prompt"),
        ({"text": "a"}, "prompt"),
        ([], "prompt"),
        ([[]], "prompt.0"),
        ([[1], []], "prompt.1"),
        ([None], "prompt.0"),
        ([1.0], "prompt.0"),
        ([True], "prompt.0"),
        ([{}], "prompt.0"),
        (["a", 1], "prompt.1"),
        (["a", [1]], "prompt.1"),
        ([[1], "a"], "prompt.1"),
        ([1, 2, "a"], "prompt.2"),
        ([1, True], "prompt.1"),
        ([1, 2.0], "prompt.1"),
        ([1, [2]], "prompt.1"),
        ([[1], [2, "3"]], "prompt.1.1"),
        ([[1], [[2]]], "prompt.1.0"),
        (["a"] * 129, "prompt"),
    ],
)
def test_what_is_no_prompt(prompt: Any, param: str) -> None:
    assert refused(prompt=prompt) == param


@pytest.mark.parametrize("name", ["model", "prompt"])
def test_required(name: str) -> None:
    body = {"model": "m", "prompt": "hi"}
    del body[name]
    with pytest.raises(ApiError, match=f"Missing required parameter: '{name}'") as caught:
        parse_completion_request(json.dumps(body).encode(), UnknownFieldLog())
    assert caught.value.param == name


BOUNDS = {
    "max_tokens": (0, 16, (1 << 63) - 1),
    "temperature": (0, 0.5, 2),
    "top_p": (0, 0.5, 1),
    "presence_penalty": (-2, 0.5, 2),
    "frequency_penalty": (-2, 0.5, 2),
    "n": (1, 2, 128),
    "best_of": (1, 2, 128),
    "logprobs": (0, 2, 5),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name: str) -> None:
    low, inside, high = BOUNDS[name]
    for value in (low, inside, high, None):
        parse(**{name: value})
    for value in (low - 1, high + 1, "1", True, [1]):
        assert refused(**{name: value}) == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "the end"}, "suffix"),
        ({"suffix": 5}, "suffix"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"stop": []}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"echo": "yes"}, "echo"),
        ({"stream": 1}, "stream"),
        ({"seed": 1.5}, "seed"),
        ({"user": 5}, "user"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 43, "n": 3}, "prompt"),
        ({"prompt": ["a"] * 43, "best_of": 3}, "prompt"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields) == param


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": ""},
        {"user": "u"},
        {"best_of": 1, "n": 3},
        {"best_of": 3, "n": 3, "stream": True},
        {"prompt": ["a"] * 64, "n": 2},
        {"stop": None, "logit_bias": None, "stream_options": None, "echo": None},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_accepted(fields: dict[str, Any]) -> None:
    parse(**fields)


def test_defaults() -> None:
    params = parse().sampling_params()
    assert (params.n, params.max_tokens, params.temperature, params.top_p) == (1, 16, 1.0, 1.0)
    assert (params.logprobs, params.prompt_logprobs, params.stop) == (None, None, ())
    assert params.output_kind is RequestOutputKind.FINAL_ONLY


def test_options_reach_the_engine() -> None:
    params = parse(
        max_tokens=0,
        temperature=0,
        top_p=0,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": 2},
        seed=3,
        n=2,
        stop="end",
        logprobs=4,
        echo=True,
        stream=True,
    ).sampling_params()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (0, 0, 1, 1)
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.5)
    assert (params.logit_bias, params.seed, params.n, params.stop) == ({7: 2}, 3, 2, ("end",))
    assert (params.logprobs, params.prompt_logprobs) == (4, 4)
    assert params.output_kind is RequestOutputKind.DELTA


def test_the_prompt_is_scored_only_where_its_logprobs_are_shown() -> None:
    assert parse(echo=True).sampling_params().prompt_logprobs is None
    assert parse(logprobs=1).sampling_params().prompt_logprobs is None
    assert parse(echo=True, logprobs=0).sampling_params().prompt_logprobs == 0


def test_the_best_are_told_by_their_logprobs() -> None:
    params = parse(n=2, best_of=5).sampling_params()
    assert (params.n, params.logprobs) == (5, 0)


def test_unknown_fields_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log = UnknownFieldLog()
    body = {"model": "m", "prompt": "x", "stream": True, "stream_options": {"a": 1}, "top_k": 5}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            parse_completion_request(json.dumps(body).encode(), log)
    names = sorted(str(record.args[0]) for record in caplog.records if record.args)
    assert names == ["stream_options.a", "top_k"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(prompt=JSON, name=st.sampled_from(sorted(CompletionRequest.__struct_fields__)), value=JSON)
def test_any_json_is_a_request_or_a_refusal(prompt: Any, name: str, value: Any) -> None:
    body = json.dumps({"model": "m", "prompt": prompt, name: value}).encode()
    try:
        request = parse_completion_request(body, UnknownFieldLog())
    except ApiError:
        return
    assert request.prompts()
