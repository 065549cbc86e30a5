"""``generate``."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import cli
from rapshee_engine.cli import generate
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams
from reference.tiny_llama import make_config


def test_generate_chats_with_the_default_model(
    capsys: pytest.CaptureFixture[str], engines: list[Any], home: Path
) -> None:
    arguments = ["hello", "--max-tokens", "5", "--temperature", "0", "--seed", "7"]
    assert cli.main(["generate", *arguments]) == 0
    assert capsys.readouterr().out == "Hello there\n"
    (engine,) = engines
    assert engine.closed
    assert engine.config.model == str(home / "cache" / "default.gguf")
    ((prompt, params),) = engine.asked
    assert prompt == {"prompt_token_ids": [5], "is_chat": True}
    assert params == SamplingParams(
        max_tokens=5, temperature=0, seed=7, output_kind=RequestOutputKind.DELTA
    )


def test_generate_continues_raw_text_from_standard_input(
    engines: list[Any], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon"))
    assert cli.main(["generate", "--raw", "--model", model, "--threads", "1"]) == 0
    (engine,) = engines
    assert (engine.config.model, engine.config.threads) == (model, 1)
    assert engine.asked[0][0] == "Once upon"
    assert engine.asked[0][1].max_tokens == 512


def test_generate_without_a_template_continues_the_text(
    engines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = generate.AsyncEngine

    def make(model: str, **options: Any) -> Any:
        engine: Any = fake(model, **options)
        engine.chat_template = None
        return engine

    monkeypatch.setattr(generate, "AsyncEngine", make)
    assert cli.main(["generate", "hi"]) == 0
    assert cli.main(["generate", "--chat", "hi"]) == 0
    assert [engine.asked[0][0] for engine in engines] == [
        "hi",
        {"prompt_token_ids": [2], "is_chat": True},
    ]


def test_generate_errors(
    error_line: Callable[..., str], usage_error: Callable[..., str], engines: list[Any]
) -> None:
    assert "the prompt is empty" in error_line("generate", " ")
    assert "temperature" in error_line("generate", "x", "--temperature", "3")
    assert "max_tokens" in error_line("generate", "x", "--max-tokens", "-1")
    assert all(engine.closed for engine in engines)
    assert "not allowed with" in usage_error("generate", "--raw", "--chat", "x")


def test_a_device_that_is_not_there_is_one_line(
    error_line: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    options = f"--model {tmp_path} --load-format dummy --device cuda:77 hello"
    line = error_line("generate", *options.split())
    assert "no device 'cuda:77'" in line
    assert "available: cpu" in line


def test_a_model_without_a_tokenizer_takes_no_text(
    error_line: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    options = f"--model {tmp_path} --load-format dummy --device cpu hello"
    line = error_line("generate", *options.split())
    assert line.endswith("was loaded without a tokenizer: it takes prompt_token_ids, not a text")
