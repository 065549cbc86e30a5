"""From what ``--model`` says to a path."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapshee_engine.cache import cache_folder
from rapshee_engine.errors import ConfigError, DownloadError
from rapshee_engine.pull import DEFAULT_MODEL, pull

__all__ = [
    "add_model_option",
    "add_revision_option",
    "cache",
    "default_model",
    "find_model",
    "pull_from_hub",
]

# org/name of the hub, and perhaps one file of it.
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:]+\.gguf))?", re.ASCII)

_WHAT = "a GGUF file, a Hugging Face folder, or an id such as org/name or org/name:file.gguf"


def add_model_option(command: Any) -> None:
    """``--model`` of the commands that take one model, and ``--revision``."""
    command.add_argument(
        "--model",
        metavar="MODEL",
        help=f"{_WHAT} (default: {DEFAULT_MODEL.name})",
    )
    add_revision_option(command)


def add_revision_option(command: Any) -> None:
    command.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of an id (default: main)"
    )


def cache() -> Path:
    """The folder of downloads."""
    return cache_folder(os.environ)


def default_model() -> str:
    """Path of the default model, downloaded if it is not there yet."""
    return str(pull(DEFAULT_MODEL, cache()))


def find_model(model: str | None, revision: str | None = None) -> str:
    """Absolute path of a path, an id (downloaded if it is not there yet) or the default model.

    Raises:
        ConfigError: nothing lies there, and it is no id; or a revision of what is no id.
        DownloadError: the id's model cannot be had.
    """
    is_path = model is not None and os.path.exists(model)
    if revision is not None and (model is None or is_path):
        raise ConfigError("--revision is one of a Hugging Face id; --model is none")
    if model is None:
        return default_model()
    if is_path:
        return os.path.realpath(model)
    if _HUB_ID.fullmatch(model) is None:
        raise ConfigError(
            f"there is no model at {model}; give {_WHAT}, or leave --model out for "
            f"{DEFAULT_MODEL.name}"
        )
    try:
        return str(pull_from_hub(model, revision))
    except DownloadError as error:
        raise DownloadError(f"there is no file or folder {model}; as an id: {error}") from None


def pull_from_hub(model: str, revision: str | None, include: Sequence[str] = ()) -> Path:
    """What the id ``model`` stands for, downloaded if it is not there yet.

    Raises:
        ConfigError: it is no id.
        DownloadError: it cannot be had.
    """
    # The hub's library takes longer to load than most commands to run.
    from rapshee_engine.hub import pull_repo

    match = _HUB_ID.fullmatch(model)
    if match is None:
        raise ConfigError(f"{model!r} is no Hugging Face id: give org/name or org/name:file.gguf")
    repo, file = match.groups()
    if file is not None and include:
        raise ConfigError("give a file or --include, not both")
    return pull_repo(
        repo, cache(), os.environ, file=file, revision=revision or "main", include=include
    )
