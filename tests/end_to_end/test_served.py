"""The server as its users start it, with the default model, through the official client."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import pytest

from reference.golden import smollm2_goldens

NUM_STREAMS = 64
MEAN_ERROR = 0.03
"""Bound on the mean |delta log-probability|, as in `test_goldens`."""


@dataclass(frozen=True)
class Served:
    base_url: str
    api_key: str
    curl: str


@pytest.fixture(scope="module")
def served(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A first start, but for the download: ``serve`` finds the model where the fixture put it."""
    assert default_model.exists()
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "rapshee_engine", "serve", "--port", "0"]
    with subprocess.Popen(
        [*command, "--kv-cache-memory", "1G"],
        env={**os.environ, "RAPSHEE_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "ready\n":
                break
        printed = "".join(lines)
        (base_url,) = re.findall(r"^URL: +(\S+)$", printed, re.MULTILINE)
        (curl,) = re.findall(r"^curl .*$", printed, re.MULTILINE)
        yield Served(base_url, (home / "initial-key").read_text().strip(), curl)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.base_url, api_key=served.api_key, max_retries=0) as client:
        yield client


def test_the_printed_curl_line_works(served: Served) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{served.curl} -sS --fail-with-body"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"role":"assistant"' in done.stdout


@pytest.mark.parametrize("model", ["rapshee-1", "rapshee-1-mini"])
def test_a_sensible_answer(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of Italy? Answer in one word."}],
        temperature=0,
        max_tokens=20,
    )
    assert "Rome" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_texts_are_scored_as_transformers_scores_them(client: openai.OpenAI) -> None:
    goldens = smollm2_goldens()
    answer = client.completions.create(
        model="rapshee-1",
        prompt=[[*golden.prompt_ids, *golden.token_ids] for golden in goldens],
        max_tokens=0,
        echo=True,
        logprobs=0,
    )
    errors: list[float] = []
    for golden, choice in zip(goldens, answer.choices, strict=True):
        assert choice.logprobs is not None
        logprobs = (choice.logprobs.token_logprobs or [])[len(golden.prompt_ids) :]
        for logprob, expected in zip(logprobs, golden.logprobs, strict=True):
            assert logprob is not None
            errors.append(abs(logprob - expected))
    assert np.mean(errors) <= MEAN_ERROR


def test_concurrent_streams_equal_their_solo_runs(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, index: int) -> tuple[str, str | None, list[float]]:
        stream = await client.chat.completions.create(
            model="rapshee-1",
            messages=[{"role": "user", "content": f"Tell me a fact about the number {index}."}],
            max_tokens=24,
            seed=index,
            logprobs=True,
            stream=True,
        )
        text, reason, logprobs = "", None, []
        async for chunk in stream:
            (choice,) = chunk.choices
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            if choice.logprobs is not None:
                logprobs += [entry.logprob for entry in choice.logprobs.content or ()]
        return text, reason, logprobs

    async def compare() -> None:
        async with openai.AsyncOpenAI(
            base_url=served.base_url, api_key=served.api_key, max_retries=0
        ) as client:
            together = await asyncio.gather(*(ask(client, i) for i in range(NUM_STREAMS)))
            alone = [await ask(client, i) for i in range(NUM_STREAMS)]
        assert list(together) == alone
        assert all(reason in {"stop", "length"} for _, reason, _ in alone)
        assert len({text for text, _, _ in alone}) > NUM_STREAMS // 2

    asyncio.run(compare())
