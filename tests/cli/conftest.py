"""A fake engine, fake launches, and the errors of commands."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import cli
from rapshee_engine.cli import chat, generate, models, serve
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.outputs import CompletionOutput, RequestOutput
from rapshee_engine.sampling_params import SamplingParams
from rapshee_engine.server.launch import LaunchOptions


class FakeEngine:
    """Says some pieces, and keeps what it was asked. A piece None: the user interrupts."""

    made: list[FakeEngine]
    pieces: Sequence[str | None] = ("Hello", " there")

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig(model=model, **options)
        self.chat_template: object | None = "a template"
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.conversations: list[list[Any]] = []
        self.closed = False
        self.made.append(self)

    def render_chat(self, messages: Sequence[Any]) -> list[int]:
        self.conversations.append(list(messages))
        return [len(messages[0]["content"])]

    async def generate(
        self, prompt: Any, params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        self.asked.append((prompt, params))
        for text in self.pieces:
            if text is None:
                raise KeyboardInterrupt  # as Ctrl-C does
            yield RequestOutput("r", None, [], [CompletionOutput(0, text, [])])

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of its own, in which the default model is always there."""
    monkeypatch.setenv("RAPSHEE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAPSHEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAPSHEE_API_KEY", raising=False)
    monkeypatch.setattr(models, "pull", lambda _model, cache, **_: cache / "default.gguf")
    return tmp_path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Engines that were made."""
    made: list[FakeEngine] = []
    monkeypatch.setattr(FakeEngine, "made", made, raising=False)
    for command in (generate, chat):
        monkeypatch.setattr(command, "AsyncEngine", FakeEngine)
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[LaunchOptions]:
    """Options of servers that were launched."""
    launched: list[LaunchOptions] = []
    monkeypatch.setattr(serve, "launch", launched.append)
    monkeypatch.setattr(serve, "configure_logging", lambda *_: None)
    return launched


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    return str(path)


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that fails, and returns the one line that it prints."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("rapshee-engine: ")
        return line

    return run


@pytest.fixture
def usage_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that is used wrongly, and returns what it prints."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        return capsys.readouterr().err

    return run
