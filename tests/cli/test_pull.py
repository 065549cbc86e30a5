"""``pull``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import cli
from rapshee_engine.cli import pull as pull_command
from rapshee_engine.pull import DEFAULT_MODEL


def test_pull_prints_the_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    calls: list[Any] = []

    def pull(model: Any, cache: Path, *, verify: bool = False) -> Path:
        calls.append((model, cache, verify))
        return Path("/there.gguf")

    monkeypatch.setattr(pull_command, "pull", pull)
    assert cli.main(["pull"]) == 0
    assert cli.main(["pull", "--verify"]) == 0
    assert capsys.readouterr().out == "/there.gguf\n/there.gguf\n"
    assert calls == [(DEFAULT_MODEL, home / "cache", verify) for verify in (False, True)]


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """As in ``rapshee-engine serve --help | true``."""
    reading, writing = os.pipe()
    os.close(reading)
    program = (
        "import sys; from rapshee_engine import cli; cli.pull.pull = lambda *_, **__: 'path'; "
    )
    program += "sys.exit(cli.main(['pull']))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environ,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
