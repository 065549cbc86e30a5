"""Writes safetensors files, well-formed or not."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from reference.quant import encode

__all__ = ["build_safetensors", "write_safetensors"]


def build_safetensors(
    header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None
) -> bytes:
    """A file's bytes; ``length`` is what the file claims its header to be long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, npt.NDArray[Any]]]) -> Path:
    """Write ``name -> (dtype, array)`` with dtype f32, f16 or bf16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in tensors.items():
        encoded = encode(array, dtype)
        header[name] = {
            "dtype": dtype.upper(),
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(encoded)],
        }
        data += encoded
    path.write_bytes(build_safetensors(header, data))
    return path
