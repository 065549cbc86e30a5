"""``POST /v1/completions`` over the ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.engine.outputs import RequestOutput
from rapshee_engine.errors import EngineClosedError, EngineDeadError, InvalidRequestError, StepError
from rapshee_engine.llm import LLM
from rapshee_engine.sampling_params import SamplingParams
from reference.fake_runner import EOS, make_engine, make_tokenizer

Ask = Callable[..., httpx.Response]

TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    """One token a byte."""
    return TOKENIZER.encode(text)


def letters(*chars: str) -> dict[str, float]:
    """A bias after which nothing else is drawn."""
    return {str(ids(char)[0]): 100.0 for char in chars}


@pytest.fixture
def complete(send: Ask, make_app: Callable[..., Any], real: AsyncEngine) -> Ask:
    """Asks the real engine; keywords are fields of the request."""
    app = make_app(engines={"real": real})

    def ask(**fields: Any) -> httpx.Response:
        body = {"model": "real", "prompt": "Once upon", "seed": 1, **fields}
        return send("POST", "/v1/completions", app=app, json=body)

    return ask


@pytest.fixture
def fake(send: Ask) -> Ask:
    """Asks the fake engine, in which anything can go wrong."""

    def ask(**fields: Any) -> httpx.Response:
        body = {"model": "fake", "prompt": "Once upon", "max_tokens": 3, **fields}
        return send("POST", "/v1/completions", json=body)

    return ask


def embedded(prompt: Any, **options: Any) -> RequestOutput:
    """What the embedded API gives for it, with a fresh engine."""
    with LLM.from_engine(make_engine()) as llm:
        (output,) = llm.generate([prompt], SamplingParams(seed=1, **options), use_tqdm=False)
    return output


def choices(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    return list(response.json()["choices"])


def texts(response: httpx.Response) -> list[str]:
    return [choice["text"] for choice in choices(response)]


def refusal(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return dict(error)


def events(response: httpx.Response) -> list[Any]:
    """Data of each event, JSON where it is JSON."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    data = [event.removeprefix("data: ") for event in response.text.split("\n\n")[:-1]]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def assembled(chunks: list[Any]) -> list[Any]:
    """The choices that the chunks of a stream make together."""
    whole: dict[int, Any] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            fresh = {"index": part["index"], "text": "", "logprobs": None, "finish_reason": None}
            before = whole.setdefault(part["index"], fresh)
            assert before["finish_reason"] is None
            before["text"] += part["text"]
            before["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                lists = before["logprobs"] or {name: [] for name in part["logprobs"]}
                before["logprobs"] = {k: v + part["logprobs"][k] for k, v in lists.items()}
    return [whole[index] for index in sorted(whole)]


# The answer


def test_the_whole_answer(complete: Ask) -> None:
    answer = complete(max_tokens=3, logit_bias=letters("a")).json()
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "object": "text_completion",
        "model": "real",
        "choices": [{"index": 0, "text": "aaa", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_sixteen_tokens_by_default(complete: Ask) -> None:
    assert texts(complete(logit_bias=letters("b"))) == ["b" * 16]


def test_a_stop_string_and_the_end_of_sequence_are_stops(complete: Ask) -> None:
    (choice,) = choices(complete(logit_bias=letters("c"), stop="cc"))
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    (choice,) = choices(complete(logit_bias={str(EOS): 100}))
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_an_answer_is_what_the_embedded_engine_gives(complete: Ask) -> None:
    expected = embedded("Once upon", n=3, temperature=0.8, top_p=0.9, presence_penalty=1.0)
    answer = complete(n=3, temperature=0.8, top_p=0.9, presence_penalty=1.0)
    assert texts(answer) == [output.text for output in expected.outputs]


def test_control_tokens_in_a_prompt_are_control_tokens(complete: Ask) -> None:
    answer = complete(prompt="<|start|>a<|end|>").json()
    assert answer["usage"]["prompt_tokens"] == 3
    assert texts(complete(prompt=[EOS + 1, *ids("a"), EOS])) == [answer["choices"][0]["text"]]


# Prompts


def test_the_forms_of_a_prompt_are_one(complete: Ask) -> None:
    forms = ["Once upon", ["Once upon"], ids("Once upon"), [ids("Once upon")]]
    assert len({str(choices(complete(prompt=form))) for form in forms}) == 1


def test_each_prompt_has_its_choices_in_order(complete: Ask) -> None:
    prompts = ["one", "two", "three"]
    answer = complete(prompt=prompts, n=2, max_tokens=5)
    alone = [choice for p in prompts for choice in choices(complete(prompt=p, n=2, max_tokens=5))]
    assert [choice["index"] for choice in choices(answer)] == list(range(6))
    assert texts(answer) == [choice["text"] for choice in alone]
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (11, 30)
    assert usage["total_tokens"] == 41


def test_cached_tokens_of_all_prompts_add_up(complete: Ask) -> None:
    prompts = ["a prompt that is cached", "another that is cached"]
    complete(prompt=prompts, max_tokens=0)
    usage = complete(prompt=prompts, max_tokens=0).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 20 + 20


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        (["a", ""], "prompt.1"),
        ([1, 258], "prompt.1"),
        ([-1], "prompt.0"),
        ([[1], [2, 10**30]], "prompt.1.1"),
        (["a", 1], "prompt.1"),
        ([], "prompt"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_cannot_be_completed_is_named(
    complete: Ask, prompt: Any, param: str, stream: bool
) -> None:
    assert refusal(complete(prompt=prompt, stream=stream))["param"] == param


def test_half_a_character_is_no_text(send: Ask, make_app: Any, real: AsyncEngine) -> None:
    app = make_app(engines={"real": real})
    body = b'{"model": "real", "prompt": ["a", "\\ud800"]}'
    headers = {"content-type": "application/json"}
    response = send("POST", "/v1/completions", app=app, content=body, headers=headers)
    assert response.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "numbers"),
    [
        ("a" * 64, 1, "prompt", (64, 65)),
        (["a", "a" * 60], 5, "prompt.1", (64, 65, 60, 5)),
        ([[1], [1] * 65], 0, "prompt.1", (64, 65)),
        ("a", 10**18, "prompt", (64, 10**18 + 1)),
    ],
)
def test_the_context_is_a_limit(
    complete: Ask,
    prompt: Any,
    max_tokens: int,
    param: str,
    numbers: tuple[int, ...],
    stream: bool,
) -> None:
    error = refusal(complete(prompt=prompt, max_tokens=max_tokens, stream=stream))
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert all(str(number) in error["message"] for number in numbers)


def test_the_context_may_be_filled(complete: Ask) -> None:
    assert complete(prompt="a" * 60, max_tokens=4).status_code == 200
    assert complete(prompt="a" * 64, max_tokens=0).status_code == 200


# Log-probabilities


def test_logprobs(complete: Ask) -> None:
    (expected,) = embedded("Once upon", logprobs=2, max_tokens=4, logit_bias={70: 9}).outputs
    (choice,) = choices(complete(logprobs=2, max_tokens=4, logit_bias={"70": 9}))
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert expected.logprobs is not None
    chosen = [next(iter(position.values())) for position in expected.logprobs]
    assert logprobs["token_logprobs"] == [pytest.approx(entry.logprob) for entry in chosen]
    for position, top in zip(expected.logprobs, logprobs["top_logprobs"], strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(e.logprob for e in position.values()))
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_tokens_stand_where_their_offsets_say(complete: Ask) -> None:
    bias = letters("x", "y", "z")
    for fields in ({}, {"echo": True}):
        prompt = "caf\u00e9 ol\u00e9"
        (choice,) = choices(complete(prompt=prompt, logprobs=0, logit_bias=bias, **fields))
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == 16 + (10 if fields else 0)
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            part = token.startswith("bytes:")
            assert choice["text"][offset] == ("\u00e9" if part else token)


@pytest.mark.parametrize("count", [0, 3])
def test_as_many_alternatives_as_asked_and_the_token(complete: Ask, count: int) -> None:
    (choice,) = choices(complete(logprobs=count, temperature=0, echo=True))
    for token, top in zip(
        choice["logprobs"]["tokens"][1:], choice["logprobs"]["top_logprobs"][1:], strict=True
    ):
        assert token in top
        assert len(top) in (count, count + 1)


# Echo


def test_the_prompt_is_repeated(complete: Ask) -> None:
    plain = texts(complete(n=2))
    assert texts(complete(n=2, echo=True)) == ["Once upon" + text for text in plain]
    assert texts(complete(prompt=ids("Once upon"), n=2, echo=True)) == [
        "Once upon" + text for text in plain
    ]
    (text,) = texts(complete(prompt=[EOS + 1, *ids("\u00e9")], echo=True, max_tokens=0))
    assert text == "<|start|>\u00e9"


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("count", [0, 5])
def test_a_text_is_scored_as_by_the_embedded_engine(
    complete: Ask, count: int, as_ids: bool
) -> None:
    text = "The quick brown fox jumps over the lazy dog, and so on to the end."[:64]
    output = embedded(text, prompt_logprobs=count, max_tokens=0)
    prompt = ids(text) if as_ids else text
    answer = complete(prompt=prompt, echo=True, logprobs=count, max_tokens=0)
    (choice,) = choices(answer)
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list(text)
    assert logprobs["text_offset"] == list(range(64))
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    expected = [next(iter(p.values())).logprob for p in output.prompt_logprobs or () if p]
    assert len(expected) == 63
    assert logprobs["token_logprobs"][1:] == expected
    assert answer.json()["usage"]["completion_tokens"] == 0


def test_prompt_and_completion_are_scored_in_one_list(complete: Ask) -> None:
    first, second = choices(complete(echo=True, logprobs=1, max_tokens=2, n=2))
    assert len(first["logprobs"]["tokens"]) == 11
    assert first["logprobs"]["tokens"][:9] == list("Once upon")
    for name, values in first["logprobs"].items():
        assert values[:9] == second["logprobs"][name][:9]
    (whole,) = choices(complete(prompt="Once upon" + "a", echo=True, logprobs=1, max_tokens=0))
    (drawn,) = choices(complete(logit_bias=letters("a"), logprobs=1, max_tokens=1))
    assert whole["logprobs"]["token_logprobs"][9] == drawn["logprobs"]["token_logprobs"][0]


def test_nothing_is_generated_where_nothing_is_asked_for(complete: Ask) -> None:
    answer = complete(max_tokens=0)
    (choice,) = choices(answer)
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("", None, "length")
    assert answer.json()["usage"]["completion_tokens"] == 0


# The best of several


def test_the_best_are_those_with_the_highest_mean_logprob(complete: Ask) -> None:
    everything = choices(complete(n=6, logprobs=0, max_tokens=5))
    means = {c["text"]: sum(c["logprobs"]["token_logprobs"]) / 5 for c in everything}
    answer = complete(n=2, best_of=6, max_tokens=5)
    assert texts(answer) == sorted(means, key=means.__getitem__, reverse=True)[:2]
    assert [(c["index"], c["logprobs"]) for c in choices(answer)] == [(0, None), (1, None)]
    assert answer.json()["usage"]["completion_tokens"] == 30
    several = complete(prompt=["Once upon"] * 2, n=2, best_of=6, max_tokens=5)
    assert texts(several) == texts(answer) * 2
    assert [choice["index"] for choice in choices(several)] == [0, 1, 2, 3]


# Streams


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True},
        {"logprobs": 2},
        {"echo": True, "logprobs": 2, "max_tokens": 3},
        {"echo": True, "logprobs": 0, "max_tokens": 0},
        {"stop": ["\n", "e", "a", "i"]},
        {"max_tokens": 0},
    ],
)
@pytest.mark.parametrize("prompt", ["Once upon", ["one", "two \u00e9"], [ids("three"), [EOS]]])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_a_whole_answer_says(
    complete: Ask, fields: dict[str, Any], prompt: Any, n: int
) -> None:
    *chunks, done = events(complete(prompt=prompt, n=n, stream=True, **fields))
    assert done == "[DONE]"
    assert assembled(chunks) == choices(complete(prompt=prompt, n=n, **fields))


def test_chunks(complete: Ask) -> None:
    *chunks, done = events(complete(stream=True, max_tokens=2, logit_bias=letters("a")))
    assert done == "[DONE]"
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == "aa"
    assert parts[-1]["finish_reason"] == "length"
    assert set(parts[0]) == {"index", "text", "logprobs", "finish_reason"}
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert "usage" not in chunk
        for key in ("id", "created", "model", "system_fingerprint"):
            assert chunk[key] == chunks[0][key]


def test_usage_comes_last_and_is_null_before(complete: Ask) -> None:
    fields = {"prompt": ["one", "two"], "n": 2, "max_tokens": 2}
    options = {"include_usage": True}
    *chunks, last, done = events(complete(stream=True, stream_options=options, **fields))
    assert done == "[DONE]"
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == complete(**fields).json()["usage"]


# Failures


def fail(error: Exception, at: int = 0) -> Callable[[int], Any]:
    async def before_token(index: int) -> None:
        if index == at:
            raise error

    return before_token


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_404(fake: Ask, stream: bool) -> None:
    response = fake(model="/etc/passwd", stream=stream)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_can_refuse(complete: Ask, fake: Ask, engine: Any, stream: bool) -> None:
    assert refusal(complete(logit_bias={"258": 1}, stream=stream))["param"] == "logit_bias"
    engine.before_token = fail(InvalidRequestError("no such token", param="stop"))
    assert refusal(fake(prompt=["a", "b"], stream=stream))["param"] == "stop"


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
    fake: Ask, engine: Any, error: Exception, status: int, stream: bool
) -> None:
    engine.before_token = fail(error)
    response = fake(prompt=["a", "b"], stream=stream)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert engine.ended.is_set()
    engine.before_token = fail(error, at=-1)
    assert fake(stream=stream).status_code == 200


def test_a_failure_inside_a_stream_is_its_last_event(fake: Ask, engine: Any) -> None:
    engine.before_token = fail(StepError("secret internals"), at=2)
    *_, before, last = events(fake(stream=True))
    assert before["choices"][0]["text"] == " moon"
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]


def test_an_aborted_request_is_an_error(fake: Ask, engine: Any) -> None:
    engine.finish_reason = "abort"
    assert fake().status_code == 500
    assert "error" in events(fake(stream=True))[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_that_ends_early_is_an_error(fake: Ask, engine: Any, stream: bool) -> None:
    async def nothing(*_args: Any, **_options: Any) -> Any:
        for output in ():
            yield output

    engine.generate = nothing
    assert fake(stream=stream).status_code == 500


def test_every_completion_needs_a_place(send: Ask, make_app: Any, engine: Any) -> None:
    app = make_app(max_pending=4)
    body = {"model": "fake", "prompt": ["a", "b"], "best_of": 2, "max_tokens": 1}
    inner: list[httpx.Response] = []

    async def ask_again(_index: int) -> None:
        engine.before_token = lambda _index: asyncio.sleep(0)
        one = {**body, "prompt": "c", "best_of": 1}
        inner.append(await asyncio.to_thread(send, "POST", "/v1/completions", app=app, json=one))

    engine.before_token = ask_again
    assert send("POST", "/v1/completions", app=app, json=body).status_code == 200
    assert inner[0].status_code == 503
    assert inner[0].json()["error"]["code"] == "server_overloaded"
    assert send("POST", "/v1/completions", app=app, json=body).status_code == 200
