"""The official client, with nothing but URL and key changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from rapshee_engine.engine.async_engine import AsyncEngine

Live = Callable[..., Any]

MESSAGES: Any = [{"role": "user", "content": "What is the moon?"}]
TEXT = "The moon is a grey caf\u00e9!"


def client(port: int, key: str = "test-key") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


def test_chat(live: Live) -> None:
    with live() as port, client(port) as api:
        answer = api.chat.completions.create(
            model="fake", messages=MESSAGES, logprobs=True, top_logprobs=2, seed=1
        )
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 11
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or []) == 7


def test_stream(live: Live) -> None:
    with live() as port, client(port) as api:
        stream = api.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


def test_text_completions(live: Live, real: AsyncEngine) -> None:
    with live(engines={"real": real}) as port, client(port) as api:
        answer = api.completions.create(
            model="real", prompt=["One", "two"], max_tokens=2, n=2, logprobs=1, echo=True, seed=1
        )
        scored = api.completions.create(
            model="real", prompt="Once upon", max_tokens=0, echo=True, logprobs=0
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[3].text.startswith("two")
    assert answer.choices[0].finish_reason == "length"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens or [])[:3] == ["O", "n", "e"]
    assert len(logprobs.token_logprobs or []) == 5
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 8)
    assert scored.choices[0].text == "Once upon"
    assert scored.choices[0].logprobs is not None
    first, *others = scored.choices[0].logprobs.token_logprobs or []
    assert first is None
    assert len(others) == 8
    assert all(value < 0 for value in others)


def test_streamed_text_completions(live: Live) -> None:
    with live() as port, client(port) as api:
        stream = api.completions.create(
            model="fake",
            prompt="What is",
            max_tokens=7,
            echo=True,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "What is" + TEXT
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 14


def test_an_answer_can_be_sent_back(live: Live, engine: Any) -> None:
    with live() as port, client(port) as api:
        answer = api.chat.completions.create(model="fake", messages=MESSAGES)
        again = [*MESSAGES, answer.choices[0].message, *MESSAGES]
        api.chat.completions.create(model="fake", messages=again)
    assert engine.conversations[-1][1] == {"role": "assistant", "content": TEXT}


def test_models(live: Live) -> None:
    with live() as port, client(port) as api:
        assert [model.id for model in api.models.list()] == ["fake", "fake-mini"]
        assert api.models.retrieve("fake-mini").owned_by == "rapshee"


def test_errors_are_the_classes_of_the_client(live: Live, engine: Any) -> None:
    with live() as port:
        with client(port, "wrong") as api, pytest.raises(openai.AuthenticationError) as denied:
            api.models.list()
        assert denied.value.code == "invalid_api_key"
        with client(port) as api:
            with pytest.raises(openai.NotFoundError):
                api.chat.completions.create(model="other", messages=MESSAGES)
            with pytest.raises(openai.BadRequestError) as refused:
                api.chat.completions.create(model="fake", messages=MESSAGES, temperature=3)
            assert refused.value.param == "temperature"
            engine.finish_reason = "abort"
            with pytest.raises(openai.APIError, match="error while processing"):
                list(api.chat.completions.create(model="fake", messages=MESSAGES, stream=True))


def test_many_streams_at_once(live: Live) -> None:
    async def one(api: openai.AsyncOpenAI) -> str:
        stream = await api.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        parts = [c.choices[0].delta.content or "" async for c in stream]
        return "".join(parts)

    async def all_of(port: int) -> list[str]:
        base_url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="test-key") as api:
            return await asyncio.gather(*(one(api) for _ in range(64)))

    with live() as port, ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, all_of(port)).result() == [TEXT] * 64
