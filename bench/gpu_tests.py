"""A pytest plugin for machines without network where not all test packages are installed.

Test files that import what is missing are left out and named at the end; tests of the default model
are skipped where it was never fetched. bench/gpu.sh loads it with ``-p gpu_tests``.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

# What parts of the package import that a machine for computing may not have.
_NEEDS = {
    "rapshee_engine.server": ("starlette", "msgspec", "uvicorn", "httptools"),
    "rapshee_engine.cli": ("starlette", "msgspec", "uvicorn", "httptools"),
}

_left_out: dict[Path, str] = {}


def _is_missing(module: str) -> str | None:
    """The first package that importing ``module`` would need and that is not there."""
    needed = [module.partition(".")[0]]
    for part, packages in _NEEDS.items():
        if module == part or module.startswith(part + "."):
            needed += packages
    for name in needed:
        # A stand-in has no spec: only what is installed counts.
        if name in sys.modules and getattr(sys.modules[name], "__spec__", None) is None:
            return name
        if importlib.util.find_spec(name) is None:
            return name
    return None


def _imports(file: Path) -> list[str]:
    """Modules that a file imports at its top level."""
    names = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def _stand_in_for_hypothesis() -> None:
    """What tests/conftest.py takes of it; files that use more of it are left out."""
    module = ModuleType("hypothesis")
    module.__spec__ = None
    nothing = SimpleNamespace(register_profile=lambda *_, **__: None, load_profile=lambda *_: None)
    module.settings = nothing  # type: ignore[attr-defined]
    module.HealthCheck = SimpleNamespace(too_slow=None)  # type: ignore[attr-defined]
    sys.modules["hypothesis"] = module


if importlib.util.find_spec("hypothesis") is None:
    _stand_in_for_hypothesis()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not (collection_path.name.startswith("test_") and collection_path.suffix == ".py"):
        return None
    missing = next(filter(None, map(_is_missing, _imports(collection_path))), None)
    if missing is None:
        return None
    _left_out[collection_path] = missing
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _has_default_model():
        return
    skip = pytest.mark.skip(reason="the default model is not in the cache folder")
    for item in items:
        if "default_model" in getattr(item, "fixturenames", ()):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for file, package in sorted(_left_out.items()):
        terminalreporter.write_line(f"not run, {package} is missing: {file.name}")


def _has_default_model() -> bool:
    # Not at the top: the tests decide when the package is imported.
    from rapshee_engine.pull import DEFAULT_MODEL, cache_folder, model_path

    return model_path(DEFAULT_MODEL, cache_folder(os.environ)).is_file()
