"""Details of the answer that the endpoint's tests do not reach."""

from __future__ import annotations

import json
from typing import Any

from rapshee_engine.engine.outputs import CompletionOutput, Logprob, RequestOutput
from rapshee_engine.server.answers import AnswerHeader
from rapshee_engine.server.responses import ChunkWriter, chat_completion

UNLIKELY = Logprob(float("-inf"), 30, "\ufffd", b"\xe2\x80")
LIKELY = Logprob(-0.5, 1, "a", b"a")


HEADER = AnswerHeader("chatcmpl-1", 1, "m", "fp")


def output(**fields: Any) -> RequestOutput:
    completion = CompletionOutput(index=0, text="", token_ids=[5], num_tokens=1, **fields)
    return RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=[1], outputs=[completion], finished=False
    )


def test_infinite_logprobs_and_partial_characters_are_json() -> None:
    whole = json.loads(
        chat_completion(HEADER, output(logprobs=[{5: UNLIKELY, 6: LIKELY}]), top_logprobs=1)
    )
    position = whole["choices"][0]["logprobs"]["content"][0]
    assert position["logprob"] == -9999.0
    assert position["bytes"] == [0xE2, 0x80]
    assert position["top_logprobs"] == [{"token": "a", "logprob": -0.5, "bytes": [97]}]


def test_choices_are_sorted() -> None:
    answer = output()
    answer.outputs.insert(0, CompletionOutput(index=1, text="b", token_ids=[], num_tokens=2))
    whole = json.loads(chat_completion(HEADER, answer, top_logprobs=0))
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert whole["usage"]["completion_tokens"] == 3


def test_a_step_without_text_writes_nothing() -> None:
    writer = ChunkWriter(HEADER, n=1, include_usage=False, top_logprobs=0)
    assert writer.continuation(output()) == []


def test_a_token_without_text_still_carries_its_logprobs() -> None:
    writer = ChunkWriter(HEADER, n=1, include_usage=False, top_logprobs=0)
    (chunk,) = writer.continuation(output(logprobs=[{5: UNLIKELY}]))
    choice = json.loads(chunk.removeprefix(b"data: "))["choices"][0]
    assert choice["delta"] == {"content": ""}
    assert len(choice["logprobs"]["content"]) == 1
