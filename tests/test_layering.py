"""Who may import whom, in C++ and in Python. The rules are those of ``docs/architecture.md``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "rapshee_engine"

# --------------------------------------------------------------------------------------------- C++

# Area -> what its files may include: areas (with all that lies in them), or single headers.
# A file belongs to the longest area that its path starts with.
CPP_MAY_INCLUDE = {
    "core": ("core",),
    "quant": ("core", "quant"),
    "model/config": ("core", "model/config.h"),
    "model": ("core", "quant", "model", "backend/backend.h"),
    "backend/backend": ("core", "model/config.h", "backend/backend.h"),
    "backend/registry": ("core", "model/config.h", "backend"),
    "backend/cpu": ("core", "quant", "model/config.h", "backend/backend.h", "backend/cpu"),
    "backend/cpu/isa": ("core", "backend/cpu"),
    "backend/cpu/ops": ("core", "backend/cpu"),
    "backend/cuda": (
        "core",
        "quant",
        "model/config.h",
        "model/random_weights.h",
        "backend/backend.h",
        "backend/cuda",
    ),
    "backend/cuda/cuda_api": ("core", "backend/cuda/cuda_api.h"),
    "backend/cuda/kernels": ("core", "backend/cuda/kernels"),
    "runner": ("core", "model", "backend/backend.h", "runner"),
    "bindings": ("core", "quant", "model", "backend", "runner", "bindings"),
}

# System header -> the only areas that may include it.
CPP_CONFINED = {
    "pybind11/": ("bindings",),
    "Python.h": ("bindings",),
    "immintrin.h": ("backend/cpu/isa",),
    "cuda": ("backend/cuda/cuda_api_runtime", "backend/cuda/kernels/device"),
}

# The door to the emulated device, which lies with the tests.
EMULATOR = {("backend/cuda/kernels/device.cuh", "emu/device.h")}

INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.MULTILINE)

SOURCES = {".h", ".cpp", ".inc", ".cu", ".cuh"}

CPP_FILES = sorted(path.relative_to(CSRC) for path in CSRC.rglob("*") if path.suffix in SOURCES)


def starts_with(path: str, area: str) -> bool:
    """Whether a path lies in a folder, or is the file of that stem."""
    return path == area or path.startswith((area + "/", area + "."))


def area_of(path: str) -> str:
    areas = [area for area in CPP_MAY_INCLUDE if starts_with(path, area)]
    assert areas, f"csrc/{path} belongs to no area: add its folder to CPP_MAY_INCLUDE"
    return max(areas, key=len)


def includes(path: Path) -> list[tuple[str, str]]:
    """Pairs of (quote, header)."""
    return INCLUDE.findall((CSRC / path).read_text())


@pytest.mark.parametrize("path", CPP_FILES, ids=str)
def test_project_includes_stay_inside_their_layer(path: Path) -> None:
    area = area_of(path.as_posix())
    for quote, header in includes(path):
        if quote != '"' or (path.as_posix(), header) in EMULATOR:
            continue
        assert (CSRC / header).is_file(), f"{header!r} is not named from csrc/"
        assert any(starts_with(header, allowed) for allowed in CPP_MAY_INCLUDE[area]), (
            f"{area} must not include {header}"
        )


@pytest.mark.parametrize("path", CPP_FILES, ids=str)
def test_confined_headers_stay_where_they_belong(path: Path) -> None:
    for quote, header in includes(path):
        if quote != "<":
            continue
        for confined, areas in CPP_CONFINED.items():
            if header.startswith(confined):
                assert any(starts_with(path.as_posix(), area) for area in areas), (
                    f"{header} belongs to {' and '.join(areas)} alone"
                )


# ------------------------------------------------------------------------------------------ Python

BASE = {"cache", "errors", "files", "sampling_params", "config"}

# First part of a module's name inside the package -> the parts that it may import.
PYTHON_MAY_IMPORT = {
    "cache": set(),
    "errors": set(),
    "files": {"errors"},
    "sampling_params": {"errors"},
    "config": {"errors"},
    "package_index": {"errors"},
    "pull": {"cache", "errors", "package_index"},
    "hub": {"errors", "hub"},
    "models": BASE | {"models"},
    "weights": BASE | {"models", "weights", "_core"},
    "tokenizer": BASE | {"tokenizer"},
    "engine": BASE | {"models", "weights", "tokenizer", "engine", "_core"},
    "llm": BASE | {"tokenizer", "engine"},
    "inspection": BASE | {"models", "weights", "tokenizer", "engine"},
    "": BASE | {"engine", "llm", "_core"},
    "tenancy": {"errors", "tenancy"},
    "server": BASE | {"tokenizer", "engine", "tenancy", "server"},
    "cli": BASE | {"engine", "llm", "inspection", "pull", "hub", "tenancy", "server", "cli"},
    "__main__": {"cli"},
}

# Each module of the engine imports only modules that stand before it.
ENGINE_ORDER = [
    "outputs",
    "stats",
    "request",
    "block_pool",
    "prefix_cache",
    "kv_cache",
    "scheduler",
    "batch_builder",
    "kv_sizing",
    "runner",
    "output_processor",
    "input_processor",
    "engine",
    "async_engine",
]

# Nothing from here down touches arrays or native code.
PURE_PYTHON_UP_TO = "scheduler"

NATIVE_IMPORTERS = {"", "engine.runner", "weights.loader", "weights.quantize"}

# What the server knows of the engine: requests go in, outputs come out.
SERVER_KNOWS_OF_ENGINE = {"engine.async_engine", "engine.outputs", "engine.stats"}

SERVER_LIBRARIES = {
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "prometheus_client",
    "sqlite3",
}

# Modules whose functions may import. The command line starts a sub-command without loading what
# only the others need: `pull` and `--help` work in a fraction of the time that a server takes.
IMPORTS_IN_FUNCTIONS = {"cli.models"}


def module_name(path: Path) -> str:
    """Name inside the package: ``engine.runner``; the package itself is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imported_names(node: ast.AST) -> Iterator[str]:
    """Full names of the modules that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        base = node.module or ""
        for alias in node.names:
            full = f"{base}.{alias.name}"
            inside = full.removeprefix("rapshee_engine.")
            yield full if inside in MODULES or inside == "_core" else base


def imports_of(module: str) -> set[str]:
    return {name for node in ast.walk(tree_of(module)) for name in imported_names(node)}


def inside_package(names: set[str]) -> set[str]:
    """The package's own modules among full names, by their names inside the package."""
    own = {name for name in names if name.split(".")[0] == "rapshee_engine"}
    return {name.removeprefix("rapshee_engine").removeprefix(".") for name in own}


def reachable(module: str) -> set[str]:
    """Full names of everything that a module imports, directly or not."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        fresh = imports_of(waiting.pop()) - seen
        seen |= fresh
        waiting += [name for name in inside_package(fresh) if name in MODULES]
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_layers_below(module: str) -> None:
    layer = module.split(".")[0]
    assert layer in PYTHON_MAY_IMPORT, f"add {layer} to PYTHON_MAY_IMPORT"
    for name in inside_package(imports_of(module)):
        assert name.split(".")[0] in PYTHON_MAY_IMPORT[layer], f"{module} must not import {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("engine.")])
def test_engine_modules_keep_their_order(module: str) -> None:
    own = module.removeprefix("engine.")
    assert own in ENGINE_ORDER, f"give {module} its place in ENGINE_ORDER"
    for name in inside_package(imports_of(module)):
        if name.startswith("engine."):
            other = name.removeprefix("engine.")
            assert ENGINE_ORDER.index(other) < ENGINE_ORDER.index(own), (
                f"{module} stands below {name}"
            )


@pytest.mark.parametrize("module", ENGINE_ORDER[: ENGINE_ORDER.index(PURE_PYTHON_UP_TO) + 1])
def test_scheduler_and_below_are_pure_python(module: str) -> None:
    tops = {name.split(".")[0] for name in reachable(f"engine.{module}")}
    assert "numpy" not in tops
    assert "_core" not in inside_package(reachable(f"engine.{module}"))


@pytest.mark.parametrize("module", MODULES)
def test_native_module_has_few_importers(module: str) -> None:
    if "_core" in inside_package(imports_of(module)):
        assert module in NATIVE_IMPORTERS


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "server"])
def test_server_sees_requests_and_outputs_alone(module: str) -> None:
    engine = {n for n in inside_package(imports_of(module)) if n.split(".")[0] == "engine"}
    assert engine <= SERVER_KNOWS_OF_ENGINE


@pytest.mark.parametrize("module", ["engine.async_engine", "llm", ""])
def test_embedding_needs_no_server(module: str) -> None:
    tops = {name.split(".")[0] for name in reachable(module)}
    assert not tops & SERVER_LIBRARIES
    assert not {n.split(".")[0] for n in inside_package(reachable(module))} & {"server", "tenancy"}


@pytest.mark.parametrize("module", MODULES)
def test_functions_do_not_import(module: str) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inner = {
        name
        for function in ast.walk(tree_of(module))
        if isinstance(function, functions)
        for node in ast.walk(function)
        for name in imported_names(node)
    }
    assert not inner or module in IMPORTS_IN_FUNCTIONS, f"{module} imports {inner} in functions"
