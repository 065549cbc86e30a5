"""``rapshee-engine info``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from rapshee_engine.cli.common import add_command
from rapshee_engine.cli.models import cache
from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.runner import build_info
from rapshee_engine.pull import DEFAULT_MODEL, model_path
from rapshee_engine.server.settings import ServerSettings
from rapshee_engine.tenancy.keys import home_folder

__all__ = ["add"]


def add(commands: Any) -> None:
    add_command(
        commands,
        "info",
        _info,
        "show build, instruction sets, devices, limits and folders",
        "RAPSHEE_CPU_ISA=scalar|avx2|avx512 selects another instruction set.",
    )


def _info(_options: argparse.Namespace) -> None:
    engine = EngineConfig(model="-")
    default_model = model_path(DEFAULT_MODEL, cache())
    present = "" if default_model.exists() else " (not downloaded yet)"
    limits = {
        "running sequences": f"{engine.max_num_seqs} (--max-num-seqs)",
        "tokens per step": f"{engine.max_num_batched_tokens} (--max-num-batched-tokens)",
        "request body": f"{ServerSettings().max_body_bytes >> 20} MiB",
        "pending completions": f"{ServerSettings().max_pending} per engine",
    }
    folders = {"default model": f"{default_model}{present}", "state": home_folder(os.environ)}
    build = build_info()
    build["cuda"] = _cuda_line(build["cuda"])
    for name, value in {**build, **limits, **folders}.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name.replace('_', ' ') + ':':22}{shown}")


def _cuda_line(cuda: Any) -> str:
    """What ``build_info()`` says about CUDA, for people."""
    if not cuda:
        return "not in this build (-C cmake.define.RAPSHEE_CUDA=ON builds it)"
    kind = "emulated, for tests: " if cuda["kind"] == "cuda-emu" else ""
    if cuda["unavailable"]:
        return f"{kind}no device: {cuda['unavailable']}"
    return kind + ", ".join(cuda["devices"])
