"""Runs a target under `atheris`, libFuzzer for Python (``pip install '.[fuzz]'``).

Options are libFuzzer's: ``-max_total_time=300``, ``-runs=1000``, a folder of inputs to begin with
and to add to. What crashes is written to the current folder; give the script that file to see it
again.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import atheris

__all__ = ["instrumented", "run"]


def instrumented() -> AbstractContextManager[Any]:
    """What is imported inside is watched: new branches make an input worth keeping."""
    watching: AbstractContextManager[Any] = atheris.instrument_imports(include=["rapshee_engine"])
    return watching


def run(target: Callable[[bytes], None]) -> None:
    """Fuzz ``target`` with the command line's options, from its valid seed on."""
    from fuzz.targets import SEEDS  # after the script has imported it, instrumented

    corpus = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (corpus / "seed").write_bytes(SEEDS[target]())
    folders = [] if any(not option.startswith("-") for option in sys.argv[1:]) else [str(corpus)]
    atheris.Setup([*sys.argv, "-timeout=20", "-rss_limit_mb=2048", *folders], target)
    atheris.Fuzz()
