"""Hostile checkpoints, all in one process with little memory: each is refused by a typed error that
names the file, at the stage that it should be, and its valid twin loads and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hostile.corpus import CASES, Verdict

Verdicts = dict[tuple[str, str], Verdict]
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def verdicts() -> Verdicts:
    """What came of each file, up to the one that ended the process, if one did."""
    # Arenas of threads would count as memory that a file takes.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "hostile.corpus", "--json"],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=TESTS,
        env=environment,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(name, kind): Verdict(**fields) for name, kind, fields in lines}
    if done.returncode:
        pytest.fail(f"the process ended with {done.returncode}: {done.stderr[-2000:]}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_is_refused_by_name(verdicts: Verdicts, name: str) -> None:
    case, verdict = CASES[name], verdicts[name, "attack"]
    assert case.error.__name__ in verdict.errors, verdict
    assert verdict.stage == case.stage, verdict
    if case.stage != "chat":  # a request's error names a field of the request
        assert (case.file or verdict.path) in verdict.message, verdict
    assert len(verdict.message) < 2000


@pytest.mark.parametrize("name", CASES)
def test_its_twin_answers(verdicts: Verdicts, name: str) -> None:
    verdict: Any = verdicts[name, "twin"]
    assert (verdict.stage, verdict.errors) == ("none", []), verdict
