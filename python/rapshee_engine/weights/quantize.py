"""Low-bit copies of unquantised checkpoints: what becomes of which tensor, and the file of them.

The file is GGUF, with the matrices alone, under their canonical names. Everything in it follows
from the checkpoint and the mode, so that a file is checked by comparing its header with the one
that it must have, into which the digest of the data goes.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from rapshee_engine import _core
from rapshee_engine.errors import ConfigError, WeightFileError
from rapshee_engine.files import open_regular
from rapshee_engine.weights.gguf import TYPE_IDS
from rapshee_engine.weights.loader import Checkpoint, TensorSource
from rapshee_engine.weights.tensor_info import BLOCK_LAYOUTS, tensor_nbytes

__all__ = ["QuantizationPlan", "plan_quantization"]

# Changes with what the same checkpoint and mode would become.
_FORMAT = 1
_ALIGNMENT = 32
_SLICE_BYTES = 16 << 20
_UNQUANTIZED = ("f32", "f16", "bf16")
# The embedding is read row by row and often serves as the head, whose errors nothing evens out.
_KEPT_FINE = ("embed.weight", "head.weight")
_DTYPES = {"q8": "q8_0", "q4": "q4_1"}


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """A checkpoint and what its matrices become.

    Attributes:
        checkpoint: as it is on the disk.
        mode: ``q8`` or ``q4``.
        sources: the matrices, in the order of the file.
        targets: what they become; offsets are those in the file of all of them.
    """

    checkpoint: Checkpoint
    mode: str
    sources: tuple[TensorSource, ...]
    targets: tuple[TensorSource, ...]

    @property
    def key(self) -> str:
        """Hex digest of everything that the file follows from, as far as it can be told without
        reading the weights: paths, sizes and times of the files, and where the matrices lie.

        Raises:
            WeightFileError: a file is gone.
        """
        files = sorted({source.file for source in self.sources})
        parts = (_FORMAT, self.mode, list(map(_stamp, files)), self.sources)
        return blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    @property
    def file_bytes(self) -> int:
        last = self.targets[-1]
        return last.offset + last.nbytes

    def checkpoint_in(self, file: str) -> Checkpoint:
        """The checkpoint with its matrices taken from ``file``."""
        moved = {target.name: replace(target, file=file) for target in self.targets}
        entries = tuple(moved.get(entry.name, entry) for entry in self.checkpoint.entries)
        return replace(self.checkpoint, entries=entries)

    def write(self, stream: BinaryIO, threads: int | None) -> None:
        """Quantise all matrices into ``stream``; ``threads`` None: on all cores.

        Raises:
            WeightFileError: a matrix cannot be read, or holds what has no low-bit form.
            OSError: ``stream`` cannot be written.
        """
        digest = blake2b(digest_size=16)
        stream.seek(self._header_bytes)
        for piece in self._data(threads or _core.usable_cores()):
            digest.update(piece)
            stream.write(piece)
        stream.seek(0)
        stream.write(self._header(digest.hexdigest()))
        stream.flush()

    def matches(self, stream: BinaryIO) -> bool:
        """Whether ``stream`` holds the file that `write` writes, whole and undamaged."""
        header = stream.read(self._header_bytes)
        digest = blake2b(digest_size=16)
        left = self.file_bytes - self._header_bytes
        while left > 0 and (piece := stream.read(min(left, _SLICE_BYTES))):
            digest.update(piece)
            left -= len(piece)
        return not left and not stream.read(1) and header == self._header(digest.hexdigest())

    @property
    def _header_bytes(self) -> int:
        return self.targets[0].offset

    def _header(self, digest: str) -> bytes:
        """The GGUF header, up to the first tensor."""
        return _header(self.targets, self.mode, digest)

    def _data(self, threads: int) -> Iterator[bytes]:
        """All that follows the header."""
        position = self._header_bytes
        with _progress_bar(sum(source.nbytes for source in self.sources)) as bar:
            for source, target in zip(self.sources, self.targets, strict=True):
                yield bytes(target.offset - position)
                position = target.offset + target.nbytes
                yield from _quantized(source, target.dtype, threads, bar)


def plan_quantization(checkpoint: Checkpoint, mode: str) -> QuantizationPlan:
    """What ``--quantize`` makes of a checkpoint: ``q8`` stores its matrices as Q8_0, ``q4`` as Q4_1
    but for the embedding and the head, which become Q8_0. Vectors stay as they are.

    Raises:
        ConfigError: the checkpoint is quantised already, has no weights, or has a matrix whose rows
            do not divide into blocks.
    """
    sources = tuple(entry for entry in checkpoint.entries if len(entry.shape) == 2)
    for source in sources:
        if source.dtype not in _UNQUANTIZED:
            raise ConfigError(
                f"quantize={mode!r} (--quantize) is for unquantised checkpoints, but {source.name} "
                f"of {checkpoint.path} is {source.dtype} already"
            )
        if not source.file:
            raise ConfigError(
                f"quantize={mode!r} (--quantize) needs weights, not load_format dummy"
            )
    placed = [_target(source, mode) for source in sources]
    offset = _aligned(len(_header(placed, mode, "0" * 32)))
    targets = []
    for target in placed:
        targets.append(replace(target, offset=offset))
        offset = _aligned(offset + target.nbytes)
    return QuantizationPlan(checkpoint, mode, sources, tuple(targets))


def _target(source: TensorSource, mode: str) -> TensorSource:
    dtype = _DTYPES["q8" if source.name in _KEPT_FINE else mode]
    try:
        nbytes = tensor_nbytes(dtype, source.shape)
    except ValueError as error:
        raise ConfigError(f"cannot quantise {source.name}: {error}") from None
    return TensorSource(source.name, dtype, source.shape, "", 0, nbytes)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _stamp(file: str) -> tuple[str, int, int, int]:
    try:
        info = os.stat(file)
    except OSError as error:
        raise WeightFileError(file, f"cannot be read: {error.strerror}") from error
    # The time of the last change of the inode cannot be set: an archive that sets the other one
    # gives two versions of a file equal stamps.
    return os.path.realpath(file), info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _header(targets: Sequence[TensorSource], mode: str, digest: str) -> bytes:
    """A GGUF header whose data begin at the first target's offset; padded to the alignment."""
    metadata = {
        "general.architecture": "rapshee-quantized",
        "rapshee.mode": mode,
        "rapshee.data_blake2b": digest,
    }
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(targets), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", 8), _string(value)]
    start = targets[0].offset
    for target in targets:
        dims = reversed(target.shape)
        parts += [_string(target.name), struct.pack("<IQQ", 2, *dims)]
        parts.append(struct.pack("<IQ", TYPE_IDS[target.dtype], target.offset - start))
    header = b"".join(parts)
    return header + bytes(_aligned(len(header)) - len(header))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _quantized(source: TensorSource, dtype: str, threads: int, bar: tqdm[Any]) -> Iterator[bytes]:
    """The blocks of one matrix, some rows at a time."""
    rows, cols = source.shape
    values, nbytes = BLOCK_LAYOUTS[source.dtype]
    row_bytes = cols // values * nbytes
    step = max(1, _SLICE_BYTES // row_bytes)
    stream, _ = open_regular(source.file)
    with stream:
        stream.seek(source.offset)
        for first in range(0, rows, step):
            data = stream.read(min(step, rows - first) * row_bytes)
            if len(data) < min(step, rows - first) * row_bytes:
                raise WeightFileError(source.file, "is truncated", tensor=source.name)
            array = np.frombuffer(data, np.uint8)
            try:
                blocks = _core.quantize_rows(array, source.dtype, cols, to=dtype, threads=threads)
            except _core.WeightError as error:
                raise WeightFileError(source.file, error.args[0], tensor=source.name) from error
            yield blocks.tobytes()
            bar.update(len(data))


def _progress_bar(total: int) -> tqdm[Any]:
    """Bytes read, if somebody looks."""
    return tqdm(
        total=total,
        desc="Quantizing weights",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
