"""``/metrics``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as open_metrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from rapshee_engine.engine.async_engine import AsyncEngine

Send = Callable[..., httpx.Response]


def test_no_key_is_needed(send: Send) -> None:
    response = send("GET", "/metrics", key=None)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert {"vllm:num_requests_running", "vllm:request_success", "process_open_fds"} <= names


def test_open_metrics_where_it_is_asked_for(send: Send) -> None:
    headers = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = send("GET", "/metrics", key=None, headers=headers)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in open_metrics_families(response.text)}
    assert "vllm:time_to_first_token_seconds" in names


@pytest.mark.parametrize("stream", [False, True])
def test_counters_are_the_sum_of_the_usage(
    send: Send, make_app: Callable[..., Any], real: AsyncEngine, stream: bool
) -> None:
    app = make_app(engines={"real": real})
    counted = ("prompt_tokens", "generation_tokens")

    def totals() -> dict[str, float]:
        families = text_string_to_metric_families(send("GET", "/metrics", app=app).text)
        values = {s.name: s.value for family in families for s in family.samples}
        return {name: values[f"vllm:{name}_total"] for name in counted}

    def usage(path: str, **fields: Any) -> dict[str, int]:
        body = {"model": "real", "max_tokens": 5, **fields}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        response = send("POST", path, app=app, json=body)
        text = response.text.split("\n\n")[-3].removeprefix("data: ") if stream else response.text
        return dict(json.loads(text)["usage"])

    before = totals()
    answers = [
        usage("/v1/completions", prompt=["one", "two"], n=2),
        usage("/v1/completions", prompt="score this", echo=True, logprobs=0, max_tokens=0),
        usage("/v1/completions", prompt="stops", stop=["a", "b", "c", "d"], max_tokens=20),
        usage("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], n=2),
    ]
    after = totals()
    assert after["prompt_tokens"] - before["prompt_tokens"] == sum(
        answer["prompt_tokens"] for answer in answers
    )
    assert after["generation_tokens"] - before["generation_tokens"] == sum(
        answer["completion_tokens"] for answer in answers
    )
