"""GGUF tensor encodings in numpy.

The quantisers round as ggml's ``quantize_row_*_ref`` do; the decoders are the definition of the
formats: a block is 32 values of a row, with scales in float16, or 256 (see `k_quants`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from reference import k_quants
from reference.k_quants import K_QUANTS, SUPER_BLOCK, SuperBlocks

__all__ = ["BLOCK", "DTYPES", "LOW_BIT", "block_length", "decode", "encode", "round_trip"]

BLOCK = 32
LOW_BIT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", *K_QUANTS)
DTYPES = ("f32", "f16", "bf16", *LOW_BIT)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def encode(values: npt.ArrayLike, dtype: str) -> bytes:
    """``values`` as the bytes of a tensor of ``dtype`` (one of `DTYPES`)."""
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    if dtype in K_QUANTS:
        return k_quants.encode(flat, dtype).tobytes()
    return _ENCODERS[dtype](flat).tobytes()


def decode(data: bytes, dtype: str, shape: Sequence[int]) -> Floats:
    """The f32 values of a tensor's bytes."""
    raw = np.frombuffer(data, dtype=np.uint8)
    values = SuperBlocks.parse(raw, dtype).values if dtype in K_QUANTS else _DECODERS[dtype](raw)
    assert values.size == math.prod(shape)
    return values.reshape(shape)


def round_trip(values: npt.ArrayLike, dtype: str) -> Floats:
    """What a reader sees of ``values`` once they are stored as ``dtype``."""
    return decode(encode(values, dtype), dtype, np.shape(values))


def block_length(dtype: str) -> int:
    """Values of a block: rows are a multiple of it long."""
    if dtype not in LOW_BIT:
        return 1
    return SUPER_BLOCK if dtype in K_QUANTS else BLOCK


def _encode_bf16(flat: Floats) -> Bytes:
    bits = flat.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").view(np.uint8)


def _decode_bf16(raw: Bytes) -> Floats:
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _inverse(scale: Floats) -> Floats:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _half_bytes(scale: Floats) -> Bytes:
    """One float16 a block -> u8 [blocks, 2]."""
    return scale.astype("<f2").reshape(-1, 1).view(np.uint8)


def _pack_nibbles(quants: Bytes) -> Bytes:
    """Value j lies in the low nibble of byte j, value j + 16 in its high nibble."""
    return quants[:, :16] | (quants[:, 16:] << np.uint8(4))


def _unpack_nibbles(packed: Bytes) -> Floats:
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)


def _encode_q4_0(flat: Floats) -> Bytes:
    blocks = flat.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-8)
    quants = (blocks * _inverse(scale) + np.float32(8.5)).astype(np.int8)
    packed = _pack_nibbles(np.minimum(quants, 15).astype(np.uint8))
    return np.concatenate([_half_bytes(scale), packed], axis=1)


def _decode_q4_0(raw: Bytes) -> Floats:
    blocks = raw.reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (_unpack_nibbles(blocks[:, 2:]) - np.float32(8)) * scale


def _encode_q4_1(flat: Floats) -> Bytes:
    blocks = flat.reshape(-1, BLOCK)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    scale = (high - low) / np.float32(15)
    quants = ((blocks - low) * _inverse(scale) + np.float32(0.5)).astype(np.int8)
    packed = _pack_nibbles(np.minimum(quants, 15).astype(np.uint8))
    return np.concatenate([_half_bytes(scale), _half_bytes(low), packed], axis=1)


def _decode_q4_1(raw: Bytes) -> Floats:
    blocks = raw.reshape(-1, 20)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    low = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    return _unpack_nibbles(blocks[:, 4:]) * scale + low


def _pack_fifth_bits(quants: Bytes) -> Bytes:
    return np.packbits(quants >> np.uint8(4), axis=1, bitorder="little")


def _unpack_fifth_bits(packed: Bytes) -> Floats:
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.float32) * np.float32(16)


def _encode_q5_0(flat: Floats) -> Bytes:
    blocks = flat.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-16)
    quants = (blocks * _inverse(scale) + np.float32(16.5)).astype(np.int8)
    quants = np.minimum(quants, 31).astype(np.uint8)
    parts = [_half_bytes(scale), _pack_fifth_bits(quants), _pack_nibbles(quants & 15)]
    return np.concatenate(parts, axis=1)


def _decode_q5_0(raw: Bytes) -> Floats:
    blocks = raw.reshape(-1, 22)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    quants = _unpack_nibbles(blocks[:, 6:]) + _unpack_fifth_bits(blocks[:, 2:6])
    return (quants - np.float32(16)) * scale


def _encode_q5_1(flat: Floats) -> Bytes:
    blocks = flat.reshape(-1, BLOCK)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    scale = (high - low) / np.float32(31)
    quants = ((blocks - low) * _inverse(scale) + np.float32(0.5)).astype(np.uint8)
    parts = [_half_bytes(scale), _half_bytes(low), _pack_fifth_bits(quants)]
    return np.concatenate([*parts, _pack_nibbles(quants & 15)], axis=1)


def _decode_q5_1(raw: Bytes) -> Floats:
    blocks = raw.reshape(-1, 24)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    low = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    quants = _unpack_nibbles(blocks[:, 8:]) + _unpack_fifth_bits(blocks[:, 4:8])
    return quants * scale + low


def _encode_q8_0(flat: Floats) -> Bytes:
    blocks = flat.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    # C's roundf: halves away from zero.
    quants = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate([_half_bytes(scale), quants.view(np.uint8)], axis=1)


def _decode_q8_0(raw: Bytes) -> Floats:
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return blocks[:, 2:].copy().view(np.int8).astype(np.float32) * scale


_ENCODERS: dict[str, Callable[[Floats], npt.NDArray[np.generic]]] = {
    "f32": lambda flat: flat.astype("<f4"),
    "f16": lambda flat: flat.astype("<f2"),
    "bf16": _encode_bf16,
    "q4_0": _encode_q4_0,
    "q4_1": _encode_q4_1,
    "q5_0": _encode_q5_0,
    "q5_1": _encode_q5_1,
    "q8_0": _encode_q8_0,
}
_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "f32": lambda raw: raw.view("<f4").astype(np.float32),
    "f16": lambda raw: raw.view("<f2").astype(np.float32),
    "bf16": _decode_bf16,
    "q4_0": _decode_q4_0,
    "q4_1": _decode_q4_1,
    "q5_0": _decode_q5_0,
    "q5_1": _decode_q5_1,
    "q8_0": _decode_q8_0,
}
