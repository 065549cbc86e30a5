"""The folder of what can be made or fetched again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(environ: Mapping[str, str]) -> Path:
    """``$RAPSHEE_CACHE``, else in the user's cache folder."""
    if environ.get("RAPSHEE_CACHE"):
        return Path(environ["RAPSHEE_CACHE"])
    cache_home = environ.get("XDG_CACHE_HOME")
    base = Path(cache_home) if cache_home else Path("~/.cache").expanduser()
    return base / "rapshee-engine"
