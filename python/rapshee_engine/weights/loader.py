"""From a path to everything that is known about a checkpoint without reading its weights."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapshee_engine.errors import ConfigError, UnsupportedModelError, WeightFileError
from rapshee_engine.files import (
    is_there,
    open_regular,
    read_json_object,
    read_optional_json_object,
    short_repr,
)
from rapshee_engine.models.config import ModelConfig
from rapshee_engine.models.gguf_config import config_from_gguf
from rapshee_engine.models.gguf_rope import ROPE_FACTORS
from rapshee_engine.models.hf_config import config_from_hf
from rapshee_engine.models.weight_names import (
    NameTable,
    TensorRows,
    canonical_shapes,
    gguf_names,
    hf_names,
    match_tensors,
)
from rapshee_engine.weights.gguf import GGUFFile, read_gguf
from rapshee_engine.weights.safetensors import read_safetensors
from rapshee_engine.weights.sharded import read_sharded_safetensors
from rapshee_engine.weights.tensor_info import TensorInfo, tensor_nbytes

__all__ = ["Checkpoint", "TensorSource", "load_checkpoint"]

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_DUMMY_DTYPE = "bf16"
_LOAD_FORMATS = ("auto", "gguf", "safetensors", "dummy")


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where the bytes of one canonical tensor lie; the fields of ``_core.TensorEntry``.

    Attributes:
        name: canonical, see `rapshee_engine.models.weight_names`.
        dtype: a key of `tensor_info.BLOCK_LAYOUTS`.
        shape: outermost dimension first.
        file: path; empty: to be filled with random numbers.
        offset: bytes from the start of the file.
        nbytes: bytes that the tensor occupies.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose headers were read and checked.

    Attributes:
        path: of the GGUF file or the folder.
        format: ``gguf``, ``safetensors`` or ``dummy``.
        config: the model.
        entries: every tensor that the model needs, in the order of use.
        eos_token_ids: tokens that end a text.
        gguf_metadata: all metadata of a GGUF file, its tokenizer's included; else None.
    """

    path: str
    format: str
    config: ModelConfig
    entries: tuple[TensorSource, ...]
    eos_token_ids: tuple[int, ...]
    gguf_metadata: Mapping[str, Any] | None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(entry.nbytes for entry in self.entries)


def load_checkpoint(
    path: str | Path, load_format: str = "auto", *, context_length: int | None = None
) -> Checkpoint:
    """Read and check the headers of a checkpoint; its weights are not read.

    Args:
        path: a GGUF file, or a Hugging Face folder with ``config.json`` and
            ``model.safetensors``, or shards with ``model.safetensors.index.json``.
        load_format: ``auto`` (a file is GGUF, a folder safetensors), ``gguf``, ``safetensors``,
            or ``dummy`` (a folder's ``config.json`` alone; every tensor is bf16 without a file).
        context_length: tokens that the model will be used for, which some rotary scalings follow
            (see `config_from_hf`); None: as many as it was made for.

    Raises:
        ConfigError: the path does not hold a checkpoint of that format.
        WeightFileError: a file is broken or inconsistent.
        UnsupportedModelError: the checkpoint needs something that is not implemented.
    """
    path = Path(path)
    if load_format not in _LOAD_FORMATS:
        raise ConfigError(
            f"load_format must be one of {', '.join(_LOAD_FORMATS)}, got {load_format!r}"
        )
    if not is_there(path):
        raise ConfigError(
            f"model path {str(path)!r} does not exist (`rapshee-engine pull` fetches the default "
            "model and prints its path)"
        )
    if load_format == "gguf" or (load_format == "auto" and not path.is_dir()):
        if not path.is_file():
            raise ConfigError(f"model path {str(path)!r} is not a file, as GGUF needs")
        return _load_gguf(path, context_length)
    if not is_there(path / _CONFIG):
        wanted = "a GGUF file or " if load_format == "auto" else ""
        raise ConfigError(f"model path {str(path)!r} must be {wanted}a folder with {_CONFIG}")
    load = _load_dummy if load_format == "dummy" else _load_safetensors
    return load(path, context_length)


def _load_gguf(path: Path, context_length: int | None) -> Checkpoint:
    header = read_gguf(path)
    file = header.path
    if header.metadata.get("split.count", 1) != 1:
        raise UnsupportedModelError(f"{file}: a model split into several files is not supported")
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    config = config_from_gguf(
        header.metadata,
        tensor_shapes=shapes,
        rope_factors=_rope_factors(header),
        source=file,
        context_length=context_length,
    )
    eos_token_ids = tuple(
        dict.fromkeys(
            token
            for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            for token in _token_ids(file, key, header.metadata.get(key), config.vocab_size)
        )
    )
    return Checkpoint(
        path=file,
        format="gguf",
        config=config,
        entries=_entries(
            config, gguf_names(config), header.tensors, dict.fromkeys(header.tensors, file), file
        ),
        eos_token_ids=eos_token_ids,
        gguf_metadata=header.metadata,
    )


def _load_safetensors(folder: Path, context_length: int | None) -> Checkpoint:
    config, eos_token_ids = _folder_config(folder, context_length)
    # Where there are both, transformers takes the single file too.
    if is_there(folder / _WEIGHTS):
        source = folder / _WEIGHTS
        tensors = read_safetensors(source)
        files: Mapping[str, str] = dict.fromkeys(tensors, str(source))
    elif is_there(folder / _WEIGHTS_INDEX):
        source = folder / _WEIGHTS_INDEX
        tensors, files = read_sharded_safetensors(source)
    else:
        raise ConfigError(f"model folder {str(folder)!r} has no {_WEIGHTS} or {_WEIGHTS_INDEX}")
    return Checkpoint(
        path=str(folder),
        format="safetensors",
        config=config,
        entries=_entries(config, hf_names(config), tensors, files, str(source)),
        eos_token_ids=eos_token_ids,
        gguf_metadata=None,
    )


def _load_dummy(folder: Path, context_length: int | None) -> Checkpoint:
    config, eos_token_ids = _folder_config(folder, context_length)
    entries = tuple(
        TensorSource(name, _DUMMY_DTYPE, shape, "", 0, tensor_nbytes(_DUMMY_DTYPE, shape))
        for name, shape in canonical_shapes(config).items()
    )
    return Checkpoint(
        path=str(folder),
        format="dummy",
        config=config,
        entries=entries,
        eos_token_ids=eos_token_ids,
        gguf_metadata=None,
    )


def _folder_config(folder: Path, context_length: int | None) -> tuple[ModelConfig, tuple[int, ...]]:
    """Configuration and end-of-sequence tokens of a Hugging Face folder."""
    file = folder / _CONFIG
    fields = read_json_object(file)
    config = config_from_hf(fields, str(file), context_length=context_length)
    # The one that transformers' generate() follows.
    generation_fields = read_optional_json_object(folder / _GENERATION_CONFIG)
    if generation_fields.get("eos_token_id") is not None:
        file, fields = folder / _GENERATION_CONFIG, generation_fields
    eos = fields.get("eos_token_id")
    return config, _token_ids(str(file), "eos_token_id", eos, config.vocab_size)


def _token_ids(file: str, key: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """A token id, a list of them, or None."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise WeightFileError(
            file, f"{key} must be token ids below {vocab_size}, got {short_repr(value)}"
        )
    return tuple(dict.fromkeys(ids))


def _entries(
    config: ModelConfig,
    names: NameTable,
    tensors: Mapping[str, TensorInfo],
    files: Mapping[str, str],
    source: str,
) -> tuple[TensorSource, ...]:
    """What the model needs of ``tensors``, each of which lies in its file of ``files``; ``source``
    is the file that lists them."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    matched = match_tensors(config, names, shapes, source)
    return tuple(
        _entry(canonical, rows, tensors[rows.name], files[rows.name])
        for canonical, rows in matched.items()
    )


def _entry(canonical: str, rows: TensorRows, tensor: TensorInfo, file: str) -> TensorSource:
    """Rows lie one after the other, so some of them are a range of the tensor's bytes."""
    dtype, before = tensor.dtype, 0
    try:
        if rows.first_row:
            before = tensor_nbytes(dtype, (rows.first_row, *rows.shape[1:]))
        nbytes = tensor_nbytes(dtype, rows.shape)
    except ValueError as error:
        raise WeightFileError(file, f"cannot be split: {error}", tensor=tensor.name) from error
    return TensorSource(canonical, dtype, rows.shape, file, tensor.offset + before, nbytes)


def _rope_factors(header: GGUFFile) -> dict[str, tuple[float, ...]]:
    """Tensors that divide the rotary frequencies, name -> values."""
    return {
        name: _rope_values(header, header.tensors[name])
        for name in ROPE_FACTORS
        if name in header.tensors
    }


def _rope_values(header: GGUFFile, tensor: TensorInfo) -> tuple[float, ...]:
    # One head is at most 4096 wide; the exact length is checked against the configuration.
    if tensor.dtype != "f32" or len(tensor.shape) != 1 or tensor.shape[0] > 2048:
        raise WeightFileError(
            header.path,
            f"must be f32 with one dimension, got {tensor.dtype} {list(tensor.shape)}",
            tensor=tensor.name,
        )
    stream, _ = open_regular(header.path)
    try:
        with stream:
            stream.seek(tensor.offset)
            data = stream.read(tensor.nbytes)
    except OSError as error:
        raise WeightFileError(header.path, f"cannot be read: {error.strerror}") from error
    if len(data) < tensor.nbytes:
        raise WeightFileError(header.path, "is truncated", tensor=tensor.name)
    return struct.unpack(f"<{tensor.shape[0]}f", data)
