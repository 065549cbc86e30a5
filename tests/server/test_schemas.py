"""Which requests are accepted, and what the refusals name."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapshee_engine.errors import InvalidRequestError
from rapshee_engine.sampling_params import RequestOutputKind
from rapshee_engine.server.errors import ApiError
from rapshee_engine.server.fields import UnknownFieldLog
from rapshee_engine.server.schemas import ChatRequest, parse_chat_request

USER = {"role": "user", "content": "hi"}


def parse(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [USER], **fields}
    return parse_chat_request(json.dumps(body).encode(), UnknownFieldLog())


def refused_bytes(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body, UnknownFieldLog())
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def refused(**fields: Any) -> str | None:
    body = {"model": "m", "messages": [USER], **fields}
    return refused_bytes(json.dumps(body).encode()).param


def with_text(text: bytes) -> bytes:
    """A body that holds raw JSON text in place of a value."""
    return b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], ' + text + b"}"


REFUSED = {
    "audio": {"voice": "x"},
    "function_call": "auto",
    "functions": [],
    "moderation": {"model": "m"},
    "prediction": {"type": "content"},
    "reasoning_effort": "low",
    "tool_choice": "auto",
    "tools": [{"type": "function"}],
    "verbosity": "low",
    "web_search_options": {},
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "service_tier": "flex",
    "store": True,
}

ACCEPTED = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_what_is_not_there_yet(name: str) -> None:
    assert refused(**{name: REFUSED[name]}) == name


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts_what_cannot_change_the_answer(name: str) -> None:
    parse(**{name: ACCEPTED[name]})


def test_accepts_the_default_service_tier() -> None:
    parse(service_tier="default")


@pytest.mark.parametrize("name", ChatRequest.__struct_fields__[2:])
def test_null_is_absence(name: str) -> None:
    assert getattr(parse(**{name: None}), name) is None


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("temperature", 0, 2),
        ("top_p", 0, 1),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("n", 1, 128),
        ("max_tokens", 1, 2048),
        ("max_completion_tokens", 1, 2048),
    ],
)
def test_bounds(field: str, low: float, high: float) -> None:
    for value in (low, high):
        assert getattr(parse(**{field: value}), field) == value
    assert refused(**{field: low - 1}) == field
    if "max" not in field:
        assert refused(**{field: high + 1}) == field


def test_top_logprobs_need_logprobs_and_have_bounds() -> None:
    assert parse(logprobs=True, top_logprobs=20).sampling_params().logprobs == 20
    assert parse(logprobs=True).sampling_params().logprobs == 0
    assert parse(logprobs=False).sampling_params().logprobs is None
    assert refused(logprobs=True, top_logprobs=21) == "top_logprobs"
    assert refused(logprobs=True, top_logprobs=-1) == "top_logprobs"
    assert refused(logprobs=False, top_logprobs=2) == "top_logprobs"
    assert refused(top_logprobs=0) == "top_logprobs"


def test_max_completion_tokens_replaces_max_tokens() -> None:
    assert parse().completion_limit is None
    assert parse(max_tokens=5).completion_limit == 5
    assert parse(max_completion_tokens=6).completion_limit == 6
    assert parse(max_completion_tokens=6, max_tokens=6).completion_limit == 6
    assert refused(max_completion_tokens=6, max_tokens=5) == "max_tokens"


@pytest.mark.parametrize("stop", ["", [], [""], ["a", ""], ["a", "b", "c", "d", "e"]])
def test_refuses_empty_and_too_many_stop_strings(stop: object) -> None:
    assert refused(stop=stop) == "stop"


def test_stop_is_a_string_or_up_to_four() -> None:
    assert parse(stop="x").sampling_params().stop == ("x",)
    assert parse(stop=["a", "b", "c", "d"]).sampling_params().stop == ("a", "b", "c", "d")


def test_logit_bias_maps_string_ids() -> None:
    assert parse(logit_bias={"0": -100, "50": 100}).sampling_params().logit_bias == {
        0: -100,
        50: 100,
    }
    assert parse(logit_bias={}).sampling_params().logit_bias == {}
    for key in ("-1", "1.5", "x", "", " 1", "01", "\u0661"):
        assert refused(logit_bias={key: 1}) == "logit_bias"
    assert refused(logit_bias={"5": 101}) == "logit_bias.5"
    assert refused(logit_bias={"5": -100.5}) == "logit_bias.5"
    assert refused(logit_bias={"5": "x"}) == "logit_bias"


def test_seed_is_any_64_bit_integer() -> None:
    for seed in (-(1 << 63), 0, (1 << 64) - 1):
        assert parse(seed=seed).sampling_params().seed == seed
    for seed in (-(1 << 63) - 1, 1 << 64, 10**40):
        with pytest.raises(InvalidRequestError) as caught:
            parse(seed=seed).sampling_params()
        assert caught.value.param == "seed"
    assert refused(seed=1.5) == "seed"
    assert refused(seed=True) == "seed"


def test_top_p_zero_is_the_likeliest_token() -> None:
    for top_p in (0, 1e-300):
        params = parse(top_p=top_p).sampling_params()
        assert (params.top_k, params.top_p) == (1, 1.0)
    params = parse(top_p=0.5).sampling_params()
    assert (params.top_k, params.top_p) == (0, 0.5)


def test_sampling_params_carry_the_request() -> None:
    params = parse(
        n=3, temperature=0.5, presence_penalty=1, frequency_penalty=-1, stream=True
    ).sampling_params()
    assert (params.n, params.temperature) == (3, 0.5)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.output_kind is RequestOutputKind.DELTA
    defaults = parse().sampling_params()
    assert (defaults.n, defaults.temperature, defaults.top_p) == (1, 1.0, 1.0)
    assert (defaults.max_tokens, defaults.seed) == (None, None)
    assert defaults.output_kind is RequestOutputKind.FINAL_ONLY


def test_stream_options() -> None:
    assert parse(stream=True, stream_options={"include_usage": True}).include_usage
    assert not parse(stream=True, stream_options={"include_usage": None}).include_usage
    assert not parse(stream=True, stream_options={"include_obfuscation": False}).include_usage
    assert refused(stream_options={"include_usage": True}) == "stream_options"
    assert refused(stream=False, stream_options={}) == "stream_options"
    assert (
        refused(stream=True, stream_options={"include_obfuscation": True})
        == "stream_options.include_obfuscation"
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ({}, "messages"),
        (None, "messages"),
        ([5], "messages.0"),
        ([USER, {"content": "x"}], "messages.1.role"),
        ([{"role": 5, "content": "x"}], "messages.0.role"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "function", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [5]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}],
            "messages.0.content.1.type",
        ),
        ([{**USER, "name": "Ada"}], "messages.0.name"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages.0.tool_calls"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "a"}}], "messages.0.audio"),
        ([{"role": "assistant", "content": "x", "refusal": "no"}], "messages.0.refusal"),
        ([{"role": "assistant", "function_call": {}}], "messages.0.function_call"),
        ([{**USER, "tool_call_id": "x"}], "messages.0.tool_call_id"),
    ],
)
def test_refusals_name_the_message(messages: object, param: str) -> None:
    assert refused(messages=messages) == param


def test_messages_as_templates_know_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": None},
    ]
    assert parse(messages=messages).template_messages() == [
        {"role": "system", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
    ]


def test_missing_fields_are_named() -> None:
    assert refused_bytes(b'{"messages": []}').param == "model"
    assert refused_bytes(b'{"model": "m"}').param == "messages"
    assert refused(model=None) == "model"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"5",
        b"{",
        with_text(b'"n": 1') + b" x",
        b"\xef\xbb\xbf{}",
        with_text(b'"user": "\xff"'),
        with_text(b'"unknown": "\xed\xa0\x80"'),
        with_text(b'"user": "\\ud800"'),
        with_text(b'"user": "\\udc00 and more text"'),
        with_text(b'"unknown": "\\ud800"'),
        with_text(b'"unknown": NaN'),
        with_text(b'"unknown": ' + b"[" * 100_000),
        with_text(b'"tools": ' + b"[" * 100_000 + b"]" * 100_000),
        with_text(b'"unknown": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    ],
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    assert refused_bytes(body).param is None


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 400])
def test_numbers_that_are_none(literal: bytes) -> None:
    assert refused_bytes(with_text(b'"temperature": ' + literal)).param in (None, "temperature")


def test_integers_beyond_64_bits() -> None:
    for name in ("n", "top_logprobs", "max_tokens", "max_completion_tokens"):
        assert refused(**{name: 1 << 70, "logprobs": True}) == name
    assert refused_bytes(with_text(b'"seed": ' + b"9" * 5000)).param == "seed"


def test_the_last_of_duplicate_keys_counts() -> None:
    assert parse_chat_request(with_text(b'"n": 2, "n": 3'), UnknownFieldLog()).n == 3


def test_unknown_fields_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log = UnknownFieldLog()
    body = {
        "model": "m",
        "messages": [{**USER, "mood": 1}],
        "top_k": 5,
        "stream": True,
        "stream_options": {"speed": 1},
    }
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            parse_chat_request(json.dumps(body).encode(), log)
    names = sorted(str(record.args[0]) for record in caplog.records if record.args)
    assert names == ["messages.mood", "stream_options.speed", "top_k"]


def test_unknown_fields_are_logged_up_to_a_bound(caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": "m", "messages": [USER], **{f"field{i}": i for i in range(150)}}
    with caplog.at_level(logging.WARNING):
        parse_chat_request(json.dumps(body).encode(), UnknownFieldLog())
    assert len(caplog.records) == 100


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "tool"]) | JSON_VALUES},
        optional={"content": JSON_VALUES, "name": JSON_VALUES},
    )
)
FIELDS = st.dictionaries(
    st.sampled_from(ChatRequest.__struct_fields__) | st.text(), JSON_VALUES, max_size=4
)


@given(fields=FIELDS, messages=MESSAGES | JSON_VALUES)
def test_any_json_is_a_request_or_a_refusal(fields: dict[str, Any], messages: Any) -> None:
    body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    try:
        request = parse_chat_request(body, UnknownFieldLog())
        request.sampling_params()
    except (ApiError, InvalidRequestError):
        return
    assert request.template_messages()


@given(st.binary())
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    with pytest.raises(ApiError):
        parse_chat_request(body, UnknownFieldLog())
