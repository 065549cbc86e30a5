"""What ``--model`` may say: a path, an id of the hub, nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import cli, hub
from rapshee_engine.errors import DownloadError
from rapshee_engine.server.launch import LaunchOptions

ErrorLine = Callable[..., str]


@pytest.fixture
def pulled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was asked of the hub, which has everything."""
    asked: list[Any] = []

    def pull_repo(repo: str, cache: Path, environ: Any, **options: Any) -> Path:
        assert (cache, environ) == (tmp_path / "cache", os.environ)
        asked.append((repo, options))
        return Path("/pulled")

    monkeypatch.setattr(hub, "pull_repo", pull_repo)
    return asked


def options(file: str | None = None, revision: str = "main", include: Any = None) -> Any:
    return {"file": file, "revision": revision, "include": include or ()}


def test_an_id_is_pulled(pulled: list[Any], engines: list[Any]) -> None:
    assert cli.main(["generate", "hi", "--model", "org/name"]) == 0
    assert cli.main(["generate", "hi", "--model", "org/n:a/b.gguf", "--revision", "v2"]) == 0
    assert [engine.config.model for engine in engines] == ["/pulled"] * 2
    assert pulled == [("org/name", options()), ("org/n", options("a/b.gguf", "v2"))]


def test_what_is_there_is_a_path(
    pulled: list[Any], engines: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "hi", "--model", "org/name"]) == 0
    assert engines[0].config.model == str(tmp_path / "org" / "name")
    assert pulled == []


@pytest.mark.parametrize("model", ["name", "a/b/c", "./a/b", "org/na me", "org/name:x.bin", "../a"])
def test_what_is_neither_is_told_both(error_line: ErrorLine, pulled: list[Any], model: str) -> None:
    line = error_line("generate", "hi", "--model", model)
    assert f"no model at {model}" in line
    assert "a GGUF file" in line
    assert "org/name:file.gguf" in line
    assert pulled == []


def test_an_id_that_is_not_there_may_have_been_a_path(
    error_line: ErrorLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise DownloadError("cannot fetch models/tiny: no such model")

    monkeypatch.setattr(hub, "pull_repo", fail)
    line = error_line("chat", "--model", "models/tiny")
    assert "no file or folder models/tiny; as an id: cannot fetch models/tiny" in line


def test_a_revision_needs_an_id(error_line: ErrorLine, model: str) -> None:
    for arguments in (["--model", model], []):
        line = error_line("generate", "hi", "--revision", "v2", *arguments)
        assert "--revision is one of a Hugging Face id" in line


def test_served_models_have_their_own_names(
    pulled: list[Any], launches: list[LaunchOptions], model: str
) -> None:
    arguments = ["--model", model, "--model", "org/name:a.gguf", "--model", "x=org/other"]
    assert cli.main(["serve", *arguments]) == 0
    assert launches[0].models == {"model": model, "org/name": "/pulled", "x": "/pulled"}
    assert pulled == [("org/name", options("a.gguf")), ("org/other", options())]


def test_pull_takes_an_id(pulled: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pull", "org/name", "--include", "*.json", "--revision", "v2"]) == 0
    assert capsys.readouterr().out == "/pulled\n"
    assert pulled == [("org/name", options(None, "v2", ["*.json"]))]


def test_wrong_pulls(error_line: ErrorLine) -> None:
    assert "no Hugging Face id" in error_line("pull", "name")
    assert "not both" in error_line("pull", "org/name:a.gguf", "--include", "*")
    assert "need the id" in error_line("pull", "--revision", "v2")
    assert "need the id" in error_line("pull", "--include", "x")
    assert "--verify is for the default model" in error_line("pull", "org/name", "--verify")
