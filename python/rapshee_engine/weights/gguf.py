"""GGUF v3 headers: metadata and where the tensors lie.

Source: the format's specification, ``docs/gguf.md`` of the ggml project. All numbers are
little-endian; a string is a u64 length and UTF-8 bytes; tensor offsets count from the first
aligned byte after the header.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rapshee_engine.errors import WeightFileError
from rapshee_engine.files import open_regular, short_repr
from rapshee_engine.weights.tensor_info import (
    MAX_DIMS,
    TensorInfo,
    check_no_overlap,
    tensor_nbytes,
)

__all__ = ["TENSOR_TYPES", "TYPE_IDS", "GGUFFile", "read_gguf"]

_MAGIC = b"GGUF"
_VERSION = 3
_DEFAULT_ALIGNMENT = 32

# Bounds on what a header may ask for. Real ones: under 100 keys, 2,000 tensors, 16 MiB, and
# arrays of 1.3 * 10^6 items in all (a large vocabulary with its merges, scores and types).
_FIRST_READ_BYTES = 16 << 20
_MAX_HEADER_BYTES = 64 << 20
_MAX_KEYS = 1 << 14
_MAX_TENSORS = 1 << 15
_MAX_ARRAY_ITEMS = 1 << 22
_MAX_ARRAY_DEPTH = 4
_ITEMS_OF_AN_ARRAY = 16  # what an array inside another counts for, beside its own items
_MAX_NAME_BYTES = (1 << 16) - 1
_MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALAR_CODES = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
)
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

TENSOR_TYPES = MappingProxyType(
    {
        0: "F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        6: "Q5_0",
        7: "Q5_1",
        8: "Q8_0",
        10: "Q2_K",
        11: "Q3_K",
        12: "Q4_K",
        13: "Q5_K",
        14: "Q6_K",
        30: "BF16",
    }
)
"""Number of a tensor type in a file -> its name, which in lower case is the dtype."""

TYPE_IDS = MappingProxyType({name.lower(): kind for kind, name in TENSOR_TYPES.items()})
"""What the file calls a dtype."""

# Known by name only so that a refusal can say what the file holds.
_UNSUPPORTED_TYPES = MappingProxyType(
    {
        9: "Q8_1",
        15: "Q8_K",
        16: "IQ2_XXS",
        17: "IQ2_XS",
        18: "IQ3_XXS",
        19: "IQ1_S",
        20: "IQ4_NL",
        21: "IQ3_S",
        22: "IQ2_S",
        23: "IQ4_XS",
        24: "I8",
        25: "I16",
        26: "I32",
        27: "I64",
        28: "F64",
        29: "IQ1_M",
        34: "TQ1_0",
        35: "TQ2_0",
        39: "MXFP4",
    }
)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """Header of a GGUF file.

    Attributes:
        path: of the file.
        metadata: key -> int, float, bool, str, or list of these.
        tensors: name -> where it lies.
    """

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_gguf(path: str | Path) -> GGUFFile:
    """Parse and check the header of a GGUF file; no tensor bytes are read.

    Raises:
        WeightFileError: the file cannot be read, is not GGUF v3, is truncated or inconsistent,
            or holds a tensor type that is not supported.
    """
    file = str(path)
    stream, file_size = open_regular(path)
    limit = min(file_size, _MAX_HEADER_BYTES)
    try:
        with stream:
            buffer = stream.read(min(limit, _FIRST_READ_BYTES))
            try:
                return _parse(file, buffer, file_size)
            except _EndOfBufferError as end:
                if end.needed <= limit:
                    buffer += stream.read(limit - len(buffer))
    except OSError as error:
        raise WeightFileError(file, f"cannot be read: {error.strerror}") from error
    try:
        return _parse(file, buffer, file_size)
    except _EndOfBufferError as end:
        if file_size > _MAX_HEADER_BYTES:
            reason = f"the header is larger than {_MAX_HEADER_BYTES >> 20} MiB"
        else:
            reason = f"the header is truncated: it goes on to byte {end.needed} at least"
        raise WeightFileError(file, reason) from None


class _EndOfBufferError(Exception):
    """The header goes on behind the bytes at hand, to ``needed`` at least."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class _Cursor:
    """Reads values one after the other; none beyond the end of the buffer."""

    __slots__ = ("array_items_left", "buffer", "file", "position")

    def __init__(self, file: str, buffer: bytes) -> None:
        self.file = file
        self.buffer = buffer
        self.position = 0
        self.array_items_left = _MAX_ARRAY_ITEMS

    def error(self, reason: str, tensor: str | None = None) -> WeightFileError:
        return WeightFileError(self.file, reason, tensor=tensor)

    def take(self, nbytes: int) -> int:
        """Advance over ``nbytes`` and return where they start."""
        start = self.position
        self.require(nbytes)
        self.position = start + nbytes
        return start

    def require(self, nbytes: int) -> None:
        """Raise `_EndOfBufferError` unless ``nbytes`` more are there."""
        if nbytes > len(self.buffer) - self.position:
            raise _EndOfBufferError(self.position + nbytes)

    def u32(self) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8))[0])

    def name(self, what: str) -> str:
        if self.position + 8 <= len(self.buffer):
            length = _U64.unpack_from(self.buffer, self.position)[0]
            if not 1 <= length <= _MAX_NAME_BYTES:
                raise self.error(f"a {what} is {length} bytes long (1 to {_MAX_NAME_BYTES})")
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """``count`` strings. A vocabulary has 10^5 of them, hence the bare loop."""
        self.require(count * _U64.size)
        buffer, position, size = self.buffer, self.position, len(self.buffer)
        length_of, out = _U64.unpack_from, []
        try:
            for _ in range(count):
                start = position + 8
                if start > size:
                    raise _EndOfBufferError(start)
                position = start + length_of(buffer, position)[0]
                if position > size:
                    raise _EndOfBufferError(position)
                out.append(buffer[start:position].decode())
        except UnicodeDecodeError as error:
            raise self.error(f"string {len(out)} of {what} is not UTF-8") from error
        self.position = position
        return out

    def value(self, kind: int, key: str) -> Any:
        """One metadata value of GGUF type ``kind``."""
        if kind == _ARRAY:
            return self.array(key, depth=1)
        return self.items(kind, 1, key)[0]

    def array(self, key: str, depth: int) -> list[Any]:
        if depth > _MAX_ARRAY_DEPTH:
            raise self.error(f"{key}: arrays nested more than {_MAX_ARRAY_DEPTH} deep")
        kind, count = self.u32(), self.u64()
        cost = count * (_ITEMS_OF_AN_ARRAY if kind == _ARRAY else 1)
        if cost > self.array_items_left:
            raise self.error(f"{key}: array of {count} items (at most {_MAX_ARRAY_ITEMS} in all)")
        self.array_items_left -= cost
        if kind == _ARRAY:
            return [self.array(key, depth + 1) for _ in range(count)]
        return self.items(kind, count, key)

    def items(self, kind: int, count: int, key: str) -> list[Any]:
        """``count`` values of the scalar or string type ``kind``."""
        if kind == _STRING:
            return self.strings(count, key)
        code = _SCALAR_CODES.get(kind)
        if code is None:
            raise self.error(f"{key}: unknown value type {kind}")
        layout = struct.Struct(f"<{count}{code}")
        values = list(layout.unpack_from(self.buffer, self.take(layout.size)))
        if kind != _BOOL:
            return values
        if any(value > 1 for value in values):
            raise self.error(f"{key}: a bool must be 0 or 1")
        return [bool(value) for value in values]


def _parse(file: str, buffer: bytes, file_size: int) -> GGUFFile:
    cursor = _Cursor(file, buffer)
    num_tensors, num_keys = _preamble(cursor)
    metadata = _metadata(cursor, num_keys)
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = _alignment(cursor, metadata)
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise cursor.error("is listed twice", info.name)
        tensors[info.name] = _locate(cursor, info, data_start, alignment, file_size)
    check_no_overlap(file, tensors.values())
    _check_no_holes(cursor, tensors, data_start, alignment)
    return GGUFFile(file, MappingProxyType(metadata), MappingProxyType(tensors))


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; return the numbers of tensors and of metadata keys."""
    magic = cursor.buffer[: len(_MAGIC)]
    if magic != _MAGIC:
        raise cursor.error(f"is not a GGUF file: it begins with {magic!r}")
    cursor.take(len(_MAGIC))
    version = cursor.u32()
    if version == int.from_bytes(_U32.pack(_VERSION), "big"):
        raise cursor.error("is a big-endian GGUF file; only little-endian is supported")
    if version != _VERSION:
        raise cursor.error(f"is GGUF version {version}; only version {_VERSION} is supported")
    num_tensors, num_keys = cursor.u64(), cursor.u64()
    if num_tensors > _MAX_TENSORS:
        raise cursor.error(f"claims {num_tensors} tensors (at most {_MAX_TENSORS})")
    if num_keys > _MAX_KEYS:
        raise cursor.error(f"claims {num_keys} metadata keys (at most {_MAX_KEYS})")
    return num_tensors, num_keys


def _metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.name("metadata key")
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} is listed twice")
        metadata[key] = cursor.value(cursor.u32(), key)
    return metadata


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    """The next tensor, its offset still relative to the data section."""
    name = cursor.name("tensor name")
    num_dims = cursor.u32()
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"must have 1 to {MAX_DIMS} dimensions, got {num_dims}", name)
    # The file lists the innermost dimension first.
    shape = tuple(reversed([cursor.u64() for _ in range(num_dims)]))
    kind, offset = cursor.u32(), cursor.u64()
    type_name = TENSOR_TYPES.get(kind)
    if type_name is None:
        refused = _UNSUPPORTED_TYPES.get(kind, f"type {kind}")
        supported = ", ".join(TENSOR_TYPES.values())
        raise cursor.error(f"{refused} is not supported; supported: {supported}", name)
    dtype = type_name.lower()
    try:
        nbytes = tensor_nbytes(dtype, shape)
    except ValueError as error:
        raise cursor.error(str(error), name) from None
    return TensorInfo(name, dtype, shape, offset, nbytes)


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    is_integer = isinstance(alignment, int) and not isinstance(alignment, bool)
    if is_integer and 8 <= alignment <= _MAX_ALIGNMENT and alignment & (alignment - 1) == 0:
        return int(alignment)
    raise cursor.error(
        f"general.alignment must be a power of two from 8 to {_MAX_ALIGNMENT}, got "
        + short_repr(alignment)
    )


def _locate(
    cursor: _Cursor, info: TensorInfo, data_start: int, alignment: int, file_size: int
) -> TensorInfo:
    """``info`` with its offset made absolute and checked."""
    if info.offset % alignment:
        raise cursor.error(
            f"offset {info.offset} is not a multiple of the alignment {alignment}", info.name
        )
    offset = data_start + info.offset
    if offset + info.nbytes > file_size:
        raise cursor.error(
            f"its data end at byte {offset + info.nbytes}, the file at byte {file_size}", info.name
        )
    return TensorInfo(info.name, info.dtype, info.shape, offset, info.nbytes)


def _check_no_holes(
    cursor: _Cursor, tensors: Mapping[str, TensorInfo], data_start: int, alignment: int
) -> None:
    """Each tensor begins at the first aligned byte after the one before, as ggml demands: nothing
    hides between them. They do not overlap."""
    expected = data_start
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset != expected:
            raise cursor.error(
                f"lies at byte {tensor.offset}, the one before ends at byte {expected}", tensor.name
            )
        expected = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
