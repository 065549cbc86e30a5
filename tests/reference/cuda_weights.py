"""The packed weights of the CUDA kernels in numpy: the layout of ``launchers.h``, implemented
independently of the C++ packing.

A panel is 8 rows, a chunk of it 512 bytes: lane 4 g + t has 16 bytes with row g's pairs of columns
(2t, 2t + 1) and (2t + 8, 2t + 9) of each 16. Codes of 2, 3, 5 and 6 bits lie in planes of 4, 2 or 1
bits instead, whose words are those of the 32 lanes side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reference.quant import round_trip

__all__ = [
    "CHUNK_COLS",
    "PackedWeight",
    "num_scales",
    "pack",
    "random_weight",
    "scale_group",
    "unpack",
    "unpack_parts",
]

PANEL_ROWS = 8
CHUNK_COLS = {"half": 32, "q8": 64} | dict.fromkeys(("q4z", "q4m", "q2m", "q3", "q5m", "q6"), 128)
# Smallest and largest code of a format, as it is multiplied.
_CODES = {
    "q8": (-128, 127),
    "q4z": (-8, 7),
    "q4m": (0, 15),
    "q2m": (0, 3),
    "q3": (-4, 3),
    "q5m": (0, 31),
    "q6": (-32, 31),
}
_MINIMUMS = ("q4m", "q2m", "q5m")
_PLANES = {"q2m": (2,), "q3": (2, 1), "q5m": (4, 1), "q6": (4, 2)}  # bits, the low ones first

Bytes = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [rows, cols] in device layout.

    Attributes:
        format: half, q8, q4z, q4m, q2m, q3, q5m or q6.
        half: bf16 or f16: the halves of the format half.
        codes: u8 [panels, chunks, 512], in planes 128 bytes a bit.
        scales: u8 [panels, chunks, bytes of a chunk's scales], empty for the format half.
    """

    format: str
    half: str
    rows: int
    cols: int
    codes: Bytes
    scales: Bytes


def scale_group(format: str) -> int:
    """Columns that share a scale."""
    return 16 if format in ("q2m", "q3", "q6") else 32


def num_scales(cols: int, format: str) -> int:
    """Groups of columns of a row that share a scale."""
    return -(-cols // scale_group(format))


def pack(
    format: str,
    half: str,
    codes: npt.ArrayLike,
    scales: npt.ArrayLike | None = None,
    minimums: npt.ArrayLike | None = None,
) -> PackedWeight:
    """Pack a matrix.

    Args:
        codes: [rows, cols]; numbers (rounded to halves) for the format half, else integers as they
            are multiplied, e.g. -128 to 127 (q8), -8 to 7 (q4z), 0 to 15 (q4m).
        scales: [rows, num_scales(cols, format)], rounded to fp16; not for the format half.
        minimums: the same, for q4m, q2m and q5m alone.
    """
    matrix = np.asarray(codes)
    rows, cols = matrix.shape
    if format == "half":
        bits = _half_bits(matrix, half)
        words = _to_lanes(bits, format).astype("<u2").view(np.uint8)
        packed_scales = np.zeros((*words.shape[:2], 0), np.uint8)
    else:
        low, high = _CODES[format]
        assert ((matrix >= low) & (matrix <= high)).all()
        assert (minimums is not None) == (format in _MINIMUMS)
        if format == "q8":
            words = _to_lanes(matrix.astype(np.int8).view(np.uint8), format)
        elif format in _PLANES:
            words = _join_planes(_to_lanes((matrix - low).astype(np.uint32), format), format)
        else:
            nibbles = (matrix + (8 if format == "q4z" else 0)).astype(np.uint32)
            words = _join_nibbles(_to_lanes(nibbles, format))
        parts = [np.asarray(scales)] + ([] if minimums is None else [np.asarray(minimums)])
        packed_scales = _pack_scales(np.stack(parts, axis=-1), format)
    packed_codes = words.reshape(*words.shape[:2], -1)
    return PackedWeight(format, half, rows, cols, packed_codes, packed_scales)


def unpack(weight: PackedWeight) -> Doubles:
    """The matrix f64 [rows, cols] that the bytes stand for, exactly."""
    if weight.format == "half":
        lanes = weight.codes.reshape(*weight.codes.shape[:2], 32, 16)
        return _half_values(_from_lanes(lanes.view("<u2"), weight), weight.half)
    values, minimums = unpack_parts(weight)
    return values + minimums


def unpack_parts(weight: PackedWeight) -> tuple[Doubles, Doubles]:
    """Scaled codes and minimums, each f64 [rows, cols], of a low-bit matrix."""
    if weight.format in _PLANES:
        lanes = _split_planes(weight)
    else:
        lanes = weight.codes.reshape(*weight.codes.shape[:2], 32, 16)
        lanes = lanes.view(np.int8) if weight.format == "q8" else _split_nibbles(lanes)
    codes = _from_lanes(lanes, weight).astype(np.float64)
    if weight.format != "q8":
        codes += _CODES[weight.format][0]
    parts = _unpack_scales(weight)  # [rows, num_scales, 1 or 2]
    spread = np.repeat(parts, scale_group(weight.format), axis=1)[:, : weight.cols]
    minimums = spread[..., 1] if weight.format in _MINIMUMS else np.zeros_like(codes)
    return codes * spread[..., 0], minimums


def random_weight(
    random: np.random.Generator, format: str, half: str, rows: int, cols: int
) -> PackedWeight:
    """Random codes, and random scales of either sign so that the matrix's variance is about
    1 / cols."""
    if format == "half":
        return pack(format, half, random.standard_normal((rows, cols)) / np.sqrt(max(cols, 1)))
    low, high = _CODES[format]
    codes = random.integers(low, high + 1, (rows, cols))
    deviation = np.sqrt(12 / max(cols, 1)) / (high - low + 1)
    shape = rows, num_scales(cols, format)
    scales = deviation * random.uniform(0.5, 1.5, shape) * random.choice([-1, 1], shape)
    fraction = random.uniform(0.3, 0.7, shape)  # of the codes that lie below 0
    minimums = -scales * high * fraction if format in _MINIMUMS else None
    return pack(format, half, codes, scales, minimums)


def _padded(matrix: npt.NDArray[np.generic], format: str) -> npt.NDArray[np.generic]:
    rows, cols = matrix.shape
    return np.pad(matrix, ((0, -rows % PANEL_ROWS), (0, -cols % CHUNK_COLS[format])))


def _to_lanes(matrix: npt.NDArray[np.generic], format: str) -> npt.NDArray[np.generic]:
    """[rows, cols] -> [panels, chunks, 32 lanes, elements of a lane]."""
    padded = _padded(matrix, format)
    panels, chunks = padded.shape[0] // PANEL_ROWS, padded.shape[1] // CHUNK_COLS[format]
    # Of a row's 16 columns: which half of them (pairs 2t or 2t + 8), t, which of the pair.
    sixteens = CHUNK_COLS[format] // 16
    split = padded.reshape(panels, PANEL_ROWS, chunks, sixteens, 2, 4, 2)
    lanes = split.transpose(0, 2, 1, 5, 3, 4, 6)
    return np.ascontiguousarray(lanes).reshape(panels, chunks, 32, 4 * sixteens)


def _from_lanes(lanes: npt.NDArray[np.generic], weight: PackedWeight) -> npt.NDArray[np.generic]:
    panels, chunks = lanes.shape[:2]
    width = CHUNK_COLS[weight.format]
    split = lanes.reshape(panels, chunks, PANEL_ROWS, 4, width // 16, 2, 2)
    matrix = split.transpose(0, 2, 1, 4, 5, 3, 6).reshape(panels * PANEL_ROWS, chunks * width)
    return matrix[: weight.rows, : weight.cols]


# A word of 32 columns has four pairs; pair j lies in nibbles j and j + 4.
_FIRST = 4 * np.arange(4, dtype=np.uint32)
_SHIFTS = np.stack([_FIRST, _FIRST + np.uint32(16)], axis=-1)


def _join_nibbles(lanes: npt.NDArray[np.generic]) -> Bytes:
    pairs = lanes.reshape(*lanes.shape[:3], 4, 4, 2).astype(np.uint32)
    words = (pairs << _SHIFTS).sum(axis=(-1, -2), dtype=np.uint32)
    return words.astype("<u4").view(np.uint8)


def _split_nibbles(lanes: Bytes) -> npt.NDArray[np.uint32]:
    words = lanes.view("<u4")
    return (words[..., None, None] >> _SHIFTS & np.uint32(15)).reshape(*lanes.shape[:3], 32)


def _join_planes(lanes: npt.NDArray[np.generic], format: str) -> Bytes:
    pairs = lanes.reshape(*lanes.shape[:3], 16, 2).astype(np.uint32)
    planes, first = [], 0
    for bits in _PLANES[format]:
        codes = (pairs >> np.uint32(first) & np.uint32((1 << bits) - 1)).reshape(
            *lanes.shape[:3], bits, 16 // bits, 2
        )
        words = (codes << _plane_shifts(bits)).sum(axis=(-1, -2), dtype=np.uint32)
        side_by_side = np.ascontiguousarray(words.swapaxes(2, 3)).astype("<u4")
        planes.append(side_by_side.reshape(*lanes.shape[:2], -1).view(np.uint8))
        first += bits
    return np.concatenate(planes, axis=2)


def _split_planes(weight: PackedWeight) -> npt.NDArray[np.uint32]:
    shape = weight.codes.shape[:2]
    codes, first = np.zeros((*shape, 32, 32), np.uint32), 0
    for bits in _PLANES[weight.format]:
        plane = np.ascontiguousarray(weight.codes[:, :, 128 * first : 128 * (first + bits)])
        words = plane.view("<u4").reshape(*shape, bits, 32).swapaxes(2, 3)[..., None, None]
        part = words >> _plane_shifts(bits) & np.uint32((1 << bits) - 1)
        codes |= part.reshape(codes.shape) << np.uint32(first)
        first += bits
    return codes


def _plane_shifts(bits: int) -> npt.NDArray[np.uint32]:
    """Of the pairs of a word: [pairs, 2]."""
    first = bits * np.arange(16 // bits, dtype=np.uint32)
    return np.stack([first, first + np.uint32(16)], axis=-1)


def _pack_scales(parts: npt.NDArray[np.generic], format: str) -> Bytes:
    """[rows, groups, 1 or 2] -> [panels, chunks, bytes]."""
    per_chunk = CHUNK_COLS[format] // scale_group(format)
    rows, groups, numbers = parts.shape
    padded = np.pad(parts, ((0, -rows % PANEL_ROWS), (0, -groups % per_chunk), (0, 0)))
    panels, chunks = padded.shape[0] // PANEL_ROWS, padded.shape[1] // per_chunk
    split = padded.reshape(panels, PANEL_ROWS, chunks, per_chunk * numbers).transpose(0, 2, 1, 3)
    halves = split.astype("<f2").reshape(panels, chunks, PANEL_ROWS * per_chunk * numbers)
    return halves.view(np.uint8)


def _unpack_scales(weight: PackedWeight) -> Doubles:
    numbers = 2 if weight.format in _MINIMUMS else 1
    per_chunk = CHUNK_COLS[weight.format] // scale_group(weight.format)
    panels, chunks = weight.scales.shape[:2]
    halves = weight.scales.view("<f2").astype(np.float64)
    split = halves.reshape(panels, chunks, PANEL_ROWS, per_chunk * numbers).transpose(0, 2, 1, 3)
    return split.reshape(panels * PANEL_ROWS, chunks * per_chunk, numbers)[: weight.rows]


def _half_bits(matrix: npt.NDArray[np.generic], half: str) -> npt.NDArray[np.uint16]:
    rounded = round_trip(matrix, half)
    if half == "f16":
        return rounded.astype("<f2").view(np.uint16)
    return (rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _half_values(bits: npt.NDArray[np.generic], half: str) -> Doubles:
    if half == "f16":
        return np.ascontiguousarray(bits).view("<f2").astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
