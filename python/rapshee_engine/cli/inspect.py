"""``rapshee-engine inspect``."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rapshee_engine.cli.common import add_command
from rapshee_engine.cli.models import add_revision_option, find_model
from rapshee_engine.config import EngineConfig
from rapshee_engine.errors import UnsupportedModelError
from rapshee_engine.inspection import inspect_checkpoint

__all__ = ["add"]

_FATAL = ("model", "tokenizer", "memory")


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "inspect",
        _inspect,
        "show what a model is, whether it can be run, and the memory it takes",
        "No weights are read. A model that cannot be run gives status 1 and the reason, after all\n"
        "that could be read of it.",
    )
    command.add_argument("model", metavar="MODEL", help="GGUF file, folder, or Hugging Face id")
    add_revision_option(command)
    command.add_argument("--tensors", action="store_true", help="list them all")
    command.add_argument("--json", action="store_true", help="as one JSON object")
    group = command.add_argument_group("memory plan")
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, or auto: a GPU where there is one"
    )
    group.add_argument(
        "--dtype", default="auto", help="of the KV cache: auto, bfloat16, float16 or float32"
    )
    group.add_argument("--kv-dtype", default="auto", help="of the KV cache alone: bf16 or int8")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest context (default: the model's)"
    )
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", default=64, help="at once (%(default)s)"
    )


def _inspect(options: argparse.Namespace) -> None:
    path = find_model(options.model, options.revision)
    report = inspect_checkpoint(
        EngineConfig(
            model=path,
            device=options.device,
            dtype=options.dtype,
            kv_dtype=options.kv_dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
        )
    )
    if options.json:
        print(json.dumps(report if options.tensors else _without_tensors(report), indent=2))
    else:
        print("\n".join(_lines(report, tensors=options.tensors)))
    reasons = [report["problems"][part] for part in _FATAL if part in report["problems"]]
    if reasons:
        raise UnsupportedModelError(f"this model cannot be run: {'; '.join(reasons)}")


def _without_tensors(report: Mapping[str, Any]) -> dict[str, Any]:
    shown = dict(report)
    if "tensors" in shown:
        shown["tensors"] = _by_dtype(shown["tensors"])
    return shown


def _by_dtype(tensors: list[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "nbytes": 0})
    for tensor in tensors:
        found[tensor["dtype"]]["count"] += 1
        found[tensor["dtype"]]["nbytes"] += tensor["nbytes"]
    return dict(found)


def _lines(report: Mapping[str, Any], *, tensors: bool) -> Iterator[str]:
    yield _line("path", report["path"])
    if "architecture" in report:
        yield _line("architecture", report["architecture"])
    for name, value in report.get("config", {}).items():
        if name != "architecture":
            yield _line(name.replace("_", " "), value)
    if "tensors" in report:
        yield from _tensor_lines(report["tensors"], every=tensors)
    if "tokenizer" in report:
        tokenizer = report["tokenizer"]
        yield _line("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']} tokens")
        yield _line("chat template", "yes" if report["chat_template"] else "no")
    if "memory" in report:
        yield from _memory_lines(report["memory"])
    for part, reason in report["problems"].items():
        yield _line(f"no {part.replace('_', ' ')}", reason)


def _tensor_lines(tensors: list[Mapping[str, Any]], *, every: bool) -> Iterator[str]:
    nbytes = sum(tensor["nbytes"] for tensor in tensors)
    yield _line("tensors", f"{len(tensors)}, {_size(nbytes)}")
    for dtype, found in _by_dtype(tensors).items():
        yield f"  {dtype:>12} {found['count']:>14} {_size(found['nbytes']):>14}"
    if every:
        for tensor in tensors:
            yield f"  {tensor['name']}  {tensor['dtype']} {tensor['shape']}"


def _memory_lines(memory: Mapping[str, Any]) -> Iterator[str]:
    yield _line("device", f"{memory['device']}, {_size(memory['available'])} available")
    yield _line("weights", _size(memory["weights"]))
    many = f"{memory['max_num_seqs']} sequences"
    yield _line("KV cache", f"{memory['kv_dtype']}, blocks of {memory['block_size']} tokens")
    yield f"  {'context':>12} {'1 sequence':>14} {many:>14}"
    for row in memory["contexts"]:
        one, all_of_them = _size(row["one_sequence"]), _size(row["all_sequences"])
        yield f"  {row['tokens']:>12,} {one:>14} {all_of_them:>14}"


def _line(name: str, value: object) -> str:
    return f"{name + ':':22}{value}"


def _size(num_bytes: int) -> str:
    if num_bytes >> 30:
        return f"{num_bytes / (1 << 30):,.2f} GiB"
    return f"{num_bytes / (1 << 20):,.1f} MiB"
