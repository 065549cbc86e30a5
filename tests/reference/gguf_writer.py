"""Writes GGUF files, well-formed or (piece by piece) not."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from reference.quant import encode

__all__ = ["TYPE_IDS", "TensorRecord", "build_gguf", "string", "typed_value", "write_gguf"]

TYPE_IDS = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10,
    "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "bf16": 30,
}  # fmt: skip


@dataclass(frozen=True)
class TensorRecord:
    """One entry of the tensor table, as it will be written: dims innermost first, offset relative
    to the data section."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int

    def to_bytes(self) -> bytes:
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return string(self.name) + dims + struct.pack("<IQ", self.kind, self.offset)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def typed_value(value: Any) -> bytes:
    """Type id and value: u32, f32, bool, string, or an array of i32, f32, bool or strings."""
    kind, data = _scalar(value) if not isinstance(value, list) else (9, _array(value))
    return struct.pack("<I", kind) + data


def _scalar(value: Any, integer: tuple[int, str] = (4, "<I")) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, int):
        return integer[0], struct.pack(integer[1], value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 8, string(value)


def _array(values: Sequence[Any]) -> bytes:
    items = [_scalar(value, integer=(5, "<i")) for value in values]
    kind = items[0][0] if items else 8
    return struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)


def build_gguf(
    metadata: Mapping[str, Any] | bytes = b"",
    tensors: Sequence[TensorRecord] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file's bytes. ``metadata`` as bytes are written as they are; counts may be made to lie."""
    if isinstance(metadata, bytes):
        keys, num_keys = metadata, num_keys or 0
    else:
        keys = b"".join(string(key) + typed_value(value) for key, value in metadata.items())
        num_keys = len(metadata) if num_keys is None else num_keys
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    header = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + keys
    header += b"".join(tensor.to_bytes() for tensor in tensors)
    return header + bytes(-len(header) % alignment) + data


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, npt.NDArray[Any]]],
) -> Path:
    """Write ``name -> (dtype, array)``, each encoded by `encode`."""
    records, data = [], b""
    for name, (dtype, array) in tensors.items():
        data += bytes(-len(data) % 32)
        dims = tuple(reversed(array.shape))
        records.append(TensorRecord(name, dims, TYPE_IDS[dtype], len(data)))
        data += encode(array, dtype)
    path.write_bytes(build_gguf(metadata, records, data))
    return path
