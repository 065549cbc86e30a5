"""safetensors headers: where the tensors lie.

Source: the format's description in the README of the safetensors project. A file is the header's
length (u64, little-endian), the header (a JSON object), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from rapshee_engine.errors import WeightFileError
from rapshee_engine.files import open_regular, parse_json_object, short_repr
from rapshee_engine.weights.tensor_info import TensorInfo, check_no_overlap, tensor_nbytes

__all__ = ["SAFETENSORS_DTYPES", "read_safetensors"]

_LENGTH_BYTES = 8
# A parsed header takes up to 25 times its bytes. 10^5 tensors, an expert model in one file, need 10
# MiB; the reference implementation's limit is 100 MB.
_MAX_HEADER_BYTES = 32 << 20
SAFETENSORS_DTYPES = MappingProxyType({"F32": "f32", "F16": "f16", "BF16": "bf16"})
"""The format's name of a dtype -> ours."""


def read_safetensors(path: str | Path) -> Mapping[str, TensorInfo]:
    """Parse and check the header of a safetensors file; no tensor bytes are read.

    Returns:
        Tensor name -> where it lies, in the order of the header.

    Raises:
        WeightFileError: the file cannot be read, is truncated or inconsistent, or holds a dtype
            that is not supported.
    """
    file = str(path)
    stream, file_size = open_regular(path)
    try:
        with stream:
            header = _read_header(file, stream, file_size)
    except OSError as error:
        raise WeightFileError(file, f"cannot be read: {error.strerror}") from error
    data_start = _LENGTH_BYTES + len(header)
    fields = parse_json_object(file, header)
    _check_metadata(file, fields.pop("__metadata__", {}))
    tensors = {
        name: _tensor_info(file, name, entry, data_start, file_size)
        for name, entry in fields.items()
    }
    check_no_overlap(file, tensors.values())
    _check_no_gaps(file, tensors, file_size - data_start)
    return MappingProxyType(tensors)


def _read_header(file: str, stream: BinaryIO, file_size: int) -> bytes:
    prefix = stream.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        raise WeightFileError(file, f"is not a safetensors file: only {len(prefix)} bytes long")
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER_BYTES:
        raise WeightFileError(
            file, f"claims a header of {length} bytes (at most {_MAX_HEADER_BYTES})"
        )
    if length > file_size - _LENGTH_BYTES:
        raise WeightFileError(
            file, f"is truncated: a header of {length} bytes in a file of {file_size}"
        )
    header = stream.read(length)
    if len(header) < length:
        raise WeightFileError(file, "is truncated inside its header")
    return header


def _check_metadata(file: str, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightFileError(file, "__metadata__ must map strings to strings")


def _tensor_info(file: str, name: str, entry: Any, data_start: int, file_size: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightFileError(
            file, "its entry must hold exactly dtype, shape and data_offsets", tensor=name
        )
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        supported = ", ".join(SAFETENSORS_DTYPES)
        raise WeightFileError(
            file,
            f"dtype {short_repr(entry['dtype'])} is not supported; supported: {supported}",
            tensor=name,
        )
    shape = _integers(file, name, "shape", entry["shape"])
    offsets = _integers(file, name, "data_offsets", entry["data_offsets"])
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= file_size - data_start:
        raise WeightFileError(
            file,
            f"data_offsets {short_repr(list(offsets))} must be a range of the file's"
            f" {file_size - data_start} bytes of data",
            tensor=name,
        )
    begin, end = offsets
    try:
        nbytes = tensor_nbytes(dtype, shape)
    except ValueError as error:
        raise WeightFileError(file, str(error), tensor=name) from None
    if nbytes != end - begin:
        raise WeightFileError(
            file,
            f"{dtype} of shape {list(shape)} takes {nbytes} bytes, data_offsets give {end - begin}",
            tensor=name,
        )
    return TensorInfo(name, dtype, shape, data_start + begin, nbytes)


def _integers(file: str, tensor: str, field: str, value: Any) -> tuple[int, ...]:
    # bool is a subclass of int, so the exact type is asked for.
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise WeightFileError(file, f"{field} must be a list of integers", tensor=tensor)
    return tuple(value)


def _check_no_gaps(file: str, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """The format forbids bytes that belong to no tensor (they could hide another file)."""
    used = sum(tensor.nbytes for tensor in tensors.values())
    if used != data_bytes:
        raise WeightFileError(file, f"holds {data_bytes} bytes of data, its tensors {used}")
