"""The command as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

import rapshee_engine
from rapshee_engine import cli
from rapshee_engine.cli import pull


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"rapshee-engine {rapshee_engine.__version__}\n"


@pytest.mark.parametrize("command", ["serve", "chat", "generate", "pull", "inspect", "info"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: rapshee-engine {command}" in text
    assert len(text.splitlines()) > 5


def test_a_command_is_needed(usage_error: Callable[..., str]) -> None:
    assert "COMMAND" in usage_error()
    assert "invalid choice" in usage_error("sing")


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pull, "pull", interrupt)
    assert cli.main(["pull"]) == 130


def test_it_runs_as_a_module() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "rapshee_engine", "serve", "--model", "a=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("rapshee-engine: there is no model at /nowhere;")


@pytest.mark.parametrize("command", [["info"], ["--version"], ["serve", "--help"]])
def test_an_instruction_set_that_is_not_there_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAPSHEE_CPU_ISA", "foo")
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("rapshee-engine: ")
    assert "available: scalar" in error
    assert error.count("\n") == 1
