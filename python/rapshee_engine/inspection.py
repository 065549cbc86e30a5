"""What a checkpoint is, whether it can be run, and the memory it takes; no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from rapshee_engine.config import EngineConfig
from rapshee_engine.engine.runner import memory_plan
from rapshee_engine.errors import ConfigError, RapsheeError
from rapshee_engine.files import read_json_object
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.tokenizer import (
    ChatTemplate,
    chat_template_from_folder,
    chat_template_from_gguf,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from rapshee_engine.weights.gguf import read_gguf
from rapshee_engine.weights.loader import Checkpoint, load_checkpoint
from rapshee_engine.weights.safetensors import read_safetensors
from rapshee_engine.weights.tensor_info import TensorInfo

__all__ = ["inspect_checkpoint"]

T = TypeVar("T")

_FIRST_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class _Raw:
    """What the files say, understood or not."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]


def inspect_checkpoint(config: EngineConfig) -> dict[str, Any]:
    """A report on the checkpoint at ``config.model``, of values that JSON has.

    ``problems`` says why it cannot be run, part by part: ``model``, ``tokenizer``, ``memory``;
    ``chat_template`` among them leaves a model that completes text. Each other key is there as far
    as the files could be read: ``path``, ``architecture``, ``config``, ``tensors``, ``tokenizer``,
    ``chat_template``, ``memory``.

    Raises:
        ConfigError: nothing lies at the path, or an option cannot be.
    """
    path = Path(config.model)
    if not path.exists():
        raise ConfigError(f"there is no model at {path}")
    problems: dict[str, str] = {}
    checkpoint = _try(
        problems, "model", lambda: load_checkpoint(path, context_length=config.max_model_len)
    )
    report: dict[str, Any] = {"path": str(path), "problems": problems}
    raw = _read_raw(path, problems)
    if raw is not None:
        report["architecture"] = raw.metadata.get("general.architecture") or raw.metadata.get(
            "model_type"
        )
    if checkpoint is not None:
        report["config"] = _config_fields(checkpoint.config)
    if raw is not None:
        report["tensors"] = [_tensor_fields(tensor) for tensor in raw.tensors]
        report |= _text_parts(path, raw, problems)
    if checkpoint is not None:
        plan = _try(problems, "memory", lambda: _memory(config, checkpoint))
        report |= {} if plan is None else {"memory": plan}
    return report


def _try(problems: dict[str, str], part: str, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except RapsheeError as error:
        problems.setdefault(part, str(error))
        return None


def _read_raw(path: Path, problems: dict[str, str]) -> _Raw | None:
    if path.is_dir():
        return _try(problems, "model", lambda: _read_folder(path))
    header = _try(problems, "model", lambda: read_gguf(path))
    return None if header is None else _Raw(header.metadata, tuple(header.tensors.values()))


def _read_folder(folder: Path) -> _Raw:
    tensors: list[TensorInfo] = []
    for file in sorted(folder.glob("*.safetensors")):
        tensors += read_safetensors(file).values()
    return _Raw(read_json_object(folder / "config.json"), tuple(tensors))


def _config_fields(config: ModelConfig) -> dict[str, Any]:
    """All but the rotary frequencies, which nobody reads, and layer by layer what differs."""
    shown = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in ("ropes", "layers")
    }
    windows = [layer.window for layer in config.layers]
    return {**shown, "num_layers": len(windows), "windows": sorted(set(windows))}


def _tensor_fields(tensor: TensorInfo) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "nbytes": tensor.nbytes,
    }


# ---- tokenizer and chat template


def _text_parts(path: Path, raw: _Raw, problems: dict[str, str]) -> dict[str, Any]:
    if path.is_dir():
        files = ("tokenizer.json", "tokenizer.model")
        kind = next((name for name in files if (path / name).exists()), None)
        tokenizer = _try(problems, "tokenizer", lambda: tokenizer_from_folder(path))
        source = _try(problems, "chat_template", lambda: chat_template_from_folder(path))
    else:
        model, words = (raw.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        kind = None if model is None else f"{model} in the GGUF"
        kind = f"{kind}, words as {words}" if kind and words else kind
        tokenizer = _try(
            problems, "tokenizer", lambda: tokenizer_from_gguf(raw.metadata, str(path))
        )
        source = _try(
            problems, "chat_template", lambda: chat_template_from_gguf(raw.metadata, str(path))
        )
    if source is not None:
        _try(problems, "chat_template", lambda: ChatTemplate(source))
    vocab_size = None if tokenizer is None else tokenizer.vocab_size
    return {
        "tokenizer": {"kind": kind, "vocab_size": vocab_size},
        "chat_template": source is not None,
    }


# ---- memory


def _memory(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    plan = memory_plan(config, checkpoint, list(_contexts(config, checkpoint)))
    return {
        "device": plan.device,
        "available": plan.available,
        "weights": plan.weights,
        "kv_dtype": plan.kv_dtype,
        "block_size": plan.block_size,
        "max_num_seqs": config.max_num_seqs,
        "contexts": [
            {"tokens": tokens, "one_sequence": one, "all_sequences": many}
            for tokens, one, many in plan.contexts
        ],
    }


def _contexts(config: EngineConfig, checkpoint: Checkpoint) -> Iterable[int]:
    """2k, 4k, ... and the longest."""
    longest = config.max_model_len or checkpoint.config.max_position
    tokens = _FIRST_CONTEXT
    while tokens < longest:
        yield tokens
        tokens *= 2
    yield longest
