"""GGUF's blocks of 256 values in numpy: groups of 16 or 32 whose scales are small integers.

A block stands for ``d * s * code - m * t``, with s (and t) for each group. The decoders are the
definition of the formats; the quantisers are simple ones, without ggml's search for the best scale.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["DECODERS", "ENCODERS", "SUPER_BLOCK"]

SUPER_BLOCK = 256

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def _halves(raw: Bytes, first: int) -> Floats:
    """The float16 at byte ``first`` of each block, as f32 [blocks, 1]."""
    return raw[:, first : first + 2].copy().view("<f2").astype(np.float32)


def _half_bytes(values: Floats) -> Bytes:
    return values.astype("<f2").reshape(-1, 1).view(np.uint8)


def _spread(per_group: npt.NDArray[np.generic]) -> Floats:
    """A value for each group -> one for each of the 256 values."""
    return np.repeat(per_group, SUPER_BLOCK // per_group.shape[1], axis=1).astype(np.float32)


# Codes of 256 values: two bits, single bits and nibbles, each laid out in its own way.


def _unpack_pairs(q: Bytes) -> Bytes:
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    return (q.reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)).reshape(-1, SUPER_BLOCK)


def _pack_pairs(codes: Bytes) -> Bytes:
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
    parts = codes.reshape(-1, 2, 4, 32) << shifts
    return np.bitwise_or.reduce(parts, axis=2).reshape(-1, 64)


def _unpack_bits(q: Bytes) -> Bytes:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    return (q.reshape(-1, 1, 32) >> shifts & np.uint8(1)).reshape(-1, SUPER_BLOCK)


def _pack_bits(bits: Bytes) -> Bytes:
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    return np.bitwise_or.reduce(bits.reshape(-1, 8, 32) << shifts, axis=1)


def _unpack_nibbles(q: Bytes, run: int) -> Bytes:
    """``run`` low nibbles, then the high ones of the same bytes."""
    q = q.reshape(-1, 128 // run, 1, run)
    return np.concatenate([q & 15, q >> 4], axis=2).reshape(-1, SUPER_BLOCK)


def _pack_nibbles(codes: Bytes, run: int) -> Bytes:
    parts = codes.reshape(-1, 128 // run, 2, run)
    return (parts[:, :, 0] | parts[:, :, 1] << 4).reshape(-1, 128)


# Integer scales of 6 bits.


def _unpack_scales_q3(raw: Bytes) -> Bytes:
    low = np.concatenate([raw[:, :8] & 15, raw[:, :8] >> 4], axis=1)
    high = np.concatenate([raw[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return low | high << 4


def _pack_scales_q3(s: Bytes) -> Bytes:
    low = s[:, :8] & 15 | (s[:, 8:] & 15) << 4
    high = [s[:, 4 * i : 4 * i + 4] >> 4 << 2 * i for i in range(4)]
    return np.concatenate([low, np.bitwise_or.reduce(high)], axis=1)


def _unpack_scales_q4(raw: Bytes) -> tuple[Bytes, Bytes]:
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    s = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    t = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return s, t


def _pack_scales_q4(s: Bytes, t: Bytes) -> Bytes:
    first = s[:, :4] | s[:, 4:] >> 4 << 6
    second = t[:, :4] | t[:, 4:] >> 4 << 6
    third = s[:, 4:] & 15 | (t[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


def _decode_q2_k(data: Bytes) -> Floats:
    raw = data.reshape(-1, 84)
    scale = _halves(raw, 80) * _spread(raw[:, :16] & 15)
    return _unpack_pairs(raw[:, 16:80]) * scale - _halves(raw, 82) * _spread(raw[:, :16] >> 4)


def _decode_q3_k(data: Bytes) -> Floats:
    raw = data.reshape(-1, 110)
    s = _unpack_scales_q3(raw[:, 96:108]).astype(np.float32) - 32
    codes = _unpack_pairs(raw[:, 32:96]) | _unpack_bits(raw[:, :32]) << 2
    return (codes.astype(np.float32) - 4) * (_halves(raw, 108) * _spread(s))


def _decode_q4_k(data: Bytes) -> Floats:
    raw = data.reshape(-1, 144)
    return _scaled(raw, _unpack_nibbles(raw[:, 16:], 32))


def _decode_q5_k(data: Bytes) -> Floats:
    raw = data.reshape(-1, 176)
    return _scaled(raw, _unpack_nibbles(raw[:, 48:], 32) | _unpack_bits(raw[:, 16:48]) << 4)


def _scaled(raw: Bytes, codes: Bytes) -> Floats:
    s, t = _unpack_scales_q4(raw[:, 4:16])
    return codes * (_halves(raw, 0) * _spread(s)) - _halves(raw, 2) * _spread(t)


def _decode_q6_k(data: Bytes) -> Floats:
    raw = data.reshape(-1, 210)
    codes = _unpack_nibbles(raw[:, :128], 64) | _unpack_pairs(raw[:, 128:192]) << 4
    scale = _halves(raw, 208) * _spread(raw[:, 192:208].copy().view(np.int8))
    return (codes.astype(np.float32) - 32) * scale


def _divide(x: Floats, by: Floats) -> Floats:
    return np.divide(x, by, out=np.zeros(np.broadcast_shapes(x.shape, by.shape), np.float32),
                     where=by != 0)  # fmt: skip


def _integers(x: Floats, most: int) -> tuple[Floats, Bytes]:
    """Non-negative x [blocks, groups] as d * integer: d [blocks, 1] in float16, integers."""
    d = (x.max(axis=1, keepdims=True) / most).astype("<f2").astype(np.float32)
    return d, np.clip(np.rint(_divide(x, d)), 0, most).astype(np.uint8)


def _with_minimums(
    flat: Floats, group: int, bits: int, most: int
) -> tuple[Floats, Bytes, Floats, Bytes, Bytes]:
    """d, s, m, t and codes; s and t up to ``most``."""
    groups = flat.reshape(-1, SUPER_BLOCK // group, group)
    low = np.minimum(groups.min(axis=2), 0)
    d, s = _integers((groups.max(axis=2) - low) / np.float32(2**bits - 1), most)
    m, t = _integers(-low, most)
    shifted = flat.reshape(-1, SUPER_BLOCK) + _spread(m * t)
    codes = np.clip(np.rint(_divide(shifted, _spread(d * s))), 0, 2**bits - 1)
    return d, s, m, t, codes.astype(np.uint8)


def _symmetric(flat: Floats, bits: int, most: int) -> tuple[Floats, Bytes, Bytes]:
    """d, s up to ``most`` of groups of 16, and codes, the middle one of which is 0."""
    zero = 2 ** (bits - 1)
    groups = flat.reshape(-1, 16, 16)
    d, s = _integers(np.abs(groups).max(axis=2) / np.float32(zero), most)
    codes = np.rint(_divide(flat.reshape(-1, SUPER_BLOCK), _spread(d * s))) + zero
    return d, s, np.clip(codes, 0, 2 * zero - 1).astype(np.uint8)


def _encode_q2_k(flat: Floats) -> Bytes:
    d, s, m, t, codes = _with_minimums(flat, 16, 2, 15)
    return np.concatenate([s | t << 4, _pack_pairs(codes), _half_bytes(d), _half_bytes(m)], axis=1)


def _encode_q3_k(flat: Floats) -> Bytes:
    d, s, codes = _symmetric(flat, 3, 31)
    parts = [_pack_bits(codes >> 2), _pack_pairs(codes & 3), _pack_scales_q3(s + np.uint8(32))]
    return np.concatenate([*parts, _half_bytes(d)], axis=1)


def _encode_q4_k(flat: Floats) -> Bytes:
    d, s, m, t, codes = _with_minimums(flat, 32, 4, 63)
    head = [_half_bytes(d), _half_bytes(m), _pack_scales_q4(s, t)]
    return np.concatenate([*head, _pack_nibbles(codes, 32)], axis=1)


def _encode_q5_k(flat: Floats) -> Bytes:
    d, s, m, t, codes = _with_minimums(flat, 32, 5, 63)
    head = [_half_bytes(d), _half_bytes(m), _pack_scales_q4(s, t)]
    return np.concatenate([*head, _pack_bits(codes >> 4), _pack_nibbles(codes & 15, 32)], axis=1)


def _encode_q6_k(flat: Floats) -> Bytes:
    d, s, codes = _symmetric(flat, 6, 127)
    parts = [_pack_nibbles(codes & 15, 64), _pack_pairs(codes >> 4), s, _half_bytes(d)]
    return np.concatenate(parts, axis=1)


ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    "q2_k": _encode_q2_k,
    "q3_k": _encode_q3_k,
    "q4_k": _encode_q4_k,
    "q5_k": _encode_q5_k,
    "q6_k": _encode_q6_k,
}
DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "q2_k": _decode_q2_k,
    "q3_k": _decode_q3_k,
    "q4_k": _decode_q4_k,
    "q5_k": _decode_q5_k,
    "q6_k": _decode_q6_k,
}
