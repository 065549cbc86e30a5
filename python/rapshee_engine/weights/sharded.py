"""safetensors checkpoints in several files, with ``model.safetensors.index.json`` beside them.

The index maps each tensor to its file (``weight_map``) and says how many bytes all tensors have
(``metadata.total_size``). Source: ``save_torch_state_dict`` of the huggingface_hub project.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rapshee_engine.errors import WeightFileError
from rapshee_engine.files import read_json_object, short_repr
from rapshee_engine.weights.safetensors import read_safetensors
from rapshee_engine.weights.tensor_info import TensorInfo

__all__ = ["read_sharded_safetensors"]


def read_sharded_safetensors(
    index: Path,
) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    """Parse and check an index and the headers of its files; no tensor bytes are read.

    The files lie beside the index. Their names are bare: an index cannot reach out of its folder.
    A file may be a symbolic link to anywhere, as all are in Hugging Face's cache.

    Returns:
        Tensor name -> where it lies in its file, and tensor name -> path of that file; both in the
        order of the index.

    Raises:
        WeightFileError: the index or one of its files cannot be read or is broken, or they do not
            name the same tensors.
    """
    fields = read_json_object(index)
    shard_of = _weight_map(index, fields.get("weight_map"))
    found: dict[str, TensorInfo] = {}
    files: dict[str, str] = {}
    for shard in dict.fromkeys(shard_of.values()):
        path = str(index.parent / shard)
        for name, tensor in read_safetensors(path).items():
            _check_place(index, name, shard, shard_of.get(name), files.get(name))
            found[name], files[name] = tensor, path
    for name, shard in shard_of.items():
        if name not in found:
            raise WeightFileError(
                str(index.parent / shard), f"is missing, but {index.name} lists it", tensor=name
            )
    _check_total(index, fields.get("metadata"), found)
    return {name: found[name] for name in shard_of}, {name: files[name] for name in shard_of}


def _weight_map(index: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise WeightFileError(
            str(index), f"weight_map must map tensors to files, got {short_repr(value)}"
        )
    for name, shard in value.items():
        if not isinstance(shard, str) or not _is_bare(shard):
            raise WeightFileError(
                str(index),
                f"weight_map must give the name of a file in this folder, got {short_repr(shard)}",
                tensor=name,
            )
    return value


def _is_bare(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _check_place(
    index: Path, name: str, shard: str, listed: str | None, seen_in: str | None
) -> None:
    """Refuse a tensor of the file ``shard`` that the index has not, has elsewhere, or that another
    file has too."""
    if seen_in is not None:
        reason = f"lies in {seen_in} too"
    elif listed is None:
        reason = f"is not listed in {index.name}"
    elif listed != shard:
        reason = f"should lie in {listed} by {index.name}"
    else:
        return
    raise WeightFileError(str(index.parent / shard), reason, tensor=name)


def _check_total(index: Path, metadata: Any, tensors: Mapping[str, TensorInfo]) -> None:
    """The size is optional, but what is stated must be true: a file may be of another version."""
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise WeightFileError(str(index), f"metadata must be an object, got {short_repr(metadata)}")
    stated = metadata.get("total_size")
    total = sum(tensor.nbytes for tensor in tensors.values())
    # Some writers make it a float; a bool is an int to Python.
    if stated is not None and (isinstance(stated, bool) or stated != total):
        raise WeightFileError(
            str(index),
            f"metadata.total_size is {short_repr(stated)}, the tensors have {total} bytes",
        )
