"""From what ``--model`` says to a path."""

from __future__ import annotations

import os
from pathlib import Path

from rapshee_engine.cache import cache_folder
from rapshee_engine.errors import ConfigError
from rapshee_engine.pull import DEFAULT_MODEL, pull

__all__ = ["cache", "default_model", "existing_model"]


def cache() -> Path:
    """The folder of downloads."""
    return cache_folder(os.environ)


def default_model() -> str:
    """Path of the default model, downloaded if it is not there yet."""
    return str(pull(DEFAULT_MODEL, cache()))


def existing_model(path: str) -> str:
    """Absolute path.

    Raises:
        ConfigError: nothing lies there.
    """
    if not os.path.exists(path):
        raise ConfigError(
            f"there is no model at {path}; give a GGUF file or a Hugging Face folder, or leave "
            f"--model out for {DEFAULT_MODEL.name}"
        )
    return os.path.realpath(path)
