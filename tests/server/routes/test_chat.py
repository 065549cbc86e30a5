"""``POST /v1/chat/completions`` over the ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rapshee_engine.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    StepError,
)

Ask = Callable[..., httpx.Response]

TEXT = "The moon is a grey caf\u00e9!"


def events(response: httpx.Response) -> list[Any]:
    """Data of each event, JSON where it is JSON."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.text.endswith("\n\n")
    data = [event.removeprefix("data: ") for event in response.text.split("\n\n")[:-1]]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def fail(error: Exception, at: int = 0) -> Callable[[int], Any]:
    async def before_token(index: int) -> None:
        if index == at:
            raise error

    return before_token


def test_the_whole_answer(chat: Ask, engine: Any) -> None:
    engine.num_cached_tokens = 3
    answer = chat().json()
    assert answer.pop("id") == engine.request_ids[0]
    assert engine.request_ids[0].startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "system_fingerprint": "fp_fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 7,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert engine.conversations == [[{"role": "user", "content": "What is the moon?"}]]


def test_every_answer_has_its_own_id(chat: Ask) -> None:
    assert chat().json()["id"] != chat().json()["id"]


def test_the_model_is_the_name_that_was_asked_for(chat: Ask) -> None:
    assert chat(model="fake-mini").json()["model"] == "fake-mini"


def test_n_and_length(chat: Ask) -> None:
    answer = chat(n=3, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == [
        "The moon",
        " moon is",
        " is a",
    ]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 6


def test_logprobs(chat: Ask) -> None:
    choice = chat(max_tokens=1, logprobs=True, top_logprobs=1).json()["choices"][0]
    moon = {"token": " moon", "logprob": -1.0, "bytes": list(b" moon")}
    assert choice["logprobs"]["content"] == [
        {"token": "The", "logprob": -2.0, "bytes": list(b"The"), "top_logprobs": [moon]}
    ]
    choice = chat(max_tokens=1, logprobs=True).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_chunks_in_order(chat: Ask) -> None:
    *chunks, done = events(chat(stream=True, max_tokens=2))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "The"},
        {"content": " moon"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, "length"]
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        assert "usage" not in chunk
        for key in ("id", "created", "model", "system_fingerprint"):
            assert chunk[key] == chunks[0][key]


def test_a_stream_says_what_a_whole_answer_says(chat: Ask) -> None:
    chunks = events(chat(stream=True))[:-1]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == TEXT


def test_usage_comes_last_and_is_null_before(chat: Ask) -> None:
    options = {"include_usage": True}
    *chunks, last, done = events(chat(stream=True, max_tokens=2, stream_options=options))
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["id"] == chunks[0]["id"]
    assert last["usage"] == chat(max_tokens=2).json()["usage"]


def test_choices_interleave(chat: Ask) -> None:
    chunks = events(chat(stream=True, n=2, max_tokens=2))[:-1]
    deltas = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in chunks]
    role = {"role": "assistant", "content": ""}
    assert deltas == [
        (0, role),
        (1, role),
        (0, {"content": "The"}),
        (1, {"content": " moon"}),
        (0, {"content": " moon"}),
        (0, {}),
        (1, {"content": " is"}),
        (1, {}),
    ]


def test_streamed_logprobs_equal_the_whole_ones(chat: Ask) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    chunks = events(chat(stream=True, **fields))[:-1]
    streamed = [
        position
        for chunk in chunks
        for position in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == chat(**fields).json()["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_404(chat: Ask, stream: bool) -> None:
    response = chat(model="/etc/passwd", stream=stream)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        "model",
        "model_not_found",
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("num_words", "max_tokens", "numbers"),
    [(32, None, (32, 32)), (40, None, (32, 40)), (20, 13, (32, 33, 20, 13)), (2, 10**18, (32, 2))],
)
def test_the_context_is_a_limit(
    refusal: Callable[..., dict[str, Any]],
    stream: bool,
    num_words: int,
    max_tokens: int | None,
    numbers: tuple[int, ...],
) -> None:
    messages = [{"role": "user", "content": "word " * num_words}]
    error = refusal(messages=messages, max_tokens=max_tokens, stream=stream)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert all(str(number) in error["message"] for number in numbers)


def test_the_context_may_be_filled(chat: Ask) -> None:
    messages = [{"role": "user", "content": "word " * 20}]
    assert chat(messages=messages, max_tokens=12).json()["usage"]["total_tokens"] == 32
    assert chat(messages=[{"role": "user", "content": "word " * 31}]).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_can_refuse(
    refusal: Callable[..., dict[str, Any]], engine: Any, stream: bool
) -> None:
    engine.before_token = fail(InvalidRequestError("no such token", param="logit_bias"))
    error = refusal(stream=stream)
    assert (error["message"], error["param"]) == ("no such token", "logit_bias")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StepError("secret internals"), 500),
        (EngineDeadError("secret internals"), 500),
        (RuntimeError("secret internals"), 500),
        (EngineClosedError("secret internals"), 503),
    ],
)
def test_failures_before_the_first_token(
    chat: Ask, engine: Any, error: Exception, status: int, stream: bool
) -> None:
    engine.before_token = fail(error)
    response = chat(stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert engine.ended.is_set()
    engine.before_token = fail(error, at=-1)
    assert chat(stream=stream).status_code == 200


def test_a_failure_inside_a_stream_is_its_last_event(chat: Ask, engine: Any) -> None:
    engine.before_token = fail(StepError("secret internals"), at=2)
    *_, before, last = events(chat(stream=True))
    assert before["choices"][0]["delta"] == {"content": " moon"}
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]


def test_an_aborted_request_is_an_error(chat: Ask, engine: Any) -> None:
    engine.finish_reason = "abort"
    assert chat().status_code == 500
    assert "error" in events(chat(stream=True))[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_that_ends_early_is_an_error(chat: Ask, engine: Any, stream: bool) -> None:
    async def nothing(*_args: Any, **_options: Any) -> Any:
        for output in ():
            yield output

    engine.generate = nothing
    assert chat(stream=stream).status_code == 500


def test_overload_is_503_with_both_waits(
    send: Ask, make_app: Callable[..., Any], engine: Any
) -> None:
    app = make_app(max_pending=4)
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "n": 3}
    inner: list[httpx.Response] = []

    async def ask_again(_index: int) -> None:
        engine.before_token = lambda _index: asyncio.sleep(0)
        inner.append(
            await asyncio.to_thread(send, "POST", "/v1/chat/completions", app=app, json=body)
        )

    engine.before_token = ask_again
    assert send("POST", "/v1/chat/completions", app=app, json=body).status_code == 200
    assert inner[0].status_code == 503
    assert inner[0].json()["error"]["type"] == "server_error"
    assert inner[0].json()["error"]["code"] == "server_overloaded"
    assert inner[0].headers["retry-after"] == "1"
    assert inner[0].headers["retry-after-ms"] == "1000"
    assert send("POST", "/v1/chat/completions", app=app, json=body).status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "", "multipart/form-data; boundary=x", "application/jsonx"]
)
def test_other_content_types_are_415(send: Ask, content_type: str) -> None:
    headers = {"content-type": content_type}
    response = send("POST", "/v1/chat/completions", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_json_with_a_charset_is_json(send: Ask) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    response = send("POST", "/v1/chat/completions", content=b"{}", headers=headers)
    assert response.json()["error"]["param"] == "model"
