"""GGUF's blocks of 256 values in numpy: groups of 16 or 32 whose scales are small integers.

A block stands for ``d * s * code - m * t``, with s (and t) for each group. Parsing is the
definition of the formats; the quantisers are simple ones, without ggml's search for the best scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["K_QUANTS", "SUPER_BLOCK", "SuperBlocks", "encode"]

SUPER_BLOCK = 256
K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


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


@dataclass(frozen=True)
class SuperBlocks:
    """Blocks by their parts: ``x = d * s * code - m * t``.

    Attributes:
        codes: int [blocks, 256], the middle one of q3_k and q6_k being 0.
        d, m: f32 [blocks, 1]; m is None for q3_k and q6_k.
        s, t: int [blocks, groups].
    """

    codes: Ints
    d: Floats
    s: Ints
    m: Floats | None = None
    t: Ints | None = None

    @property
    def scales(self) -> Floats:
        """f32 [blocks, groups], exact."""
        return self.d * self.s.astype(np.float32)

    @property
    def minimums(self) -> Floats | None:
        """The same, what is added to the products; None where it is nothing."""
        if self.m is None or self.t is None:
            return None
        return -self.m * self.t.astype(np.float32)

    @property
    def values(self) -> Floats:
        """f32 [blocks, 256]"""
        products = self.codes.astype(np.float32) * _spread(self.scales)
        return products if self.minimums is None else products + _spread(self.minimums)

    @classmethod
    def parse(cls, data: Bytes, dtype: str) -> SuperBlocks:
        return _PARSERS[dtype](data)

    def assemble(self, dtype: str) -> Bytes:
        """u8 [blocks, bytes of a block]"""
        return _ASSEMBLERS[dtype](self)


def _parse_q2_k(data: Bytes) -> SuperBlocks:
    raw = data.reshape(-1, 84)
    s, t = raw[:, :16] & 15, raw[:, :16] >> 4
    codes = _unpack_pairs(raw[:, 16:80])
    return SuperBlocks(codes.astype(int), _halves(raw, 80), s.astype(int), _halves(raw, 82), t)


def _parse_q3_k(data: Bytes) -> SuperBlocks:
    raw = data.reshape(-1, 110)
    codes = _unpack_pairs(raw[:, 32:96]) | _unpack_bits(raw[:, :32]) << 2
    s = _unpack_scales_q3(raw[:, 96:108]).astype(int) - 32
    return SuperBlocks(codes.astype(int) - 4, _halves(raw, 108), s)


def _parse_q4_k(data: Bytes) -> SuperBlocks:
    raw = data.reshape(-1, 144)
    return _with_six_bits(raw, _unpack_nibbles(raw[:, 16:], 32))


def _parse_q5_k(data: Bytes) -> SuperBlocks:
    raw = data.reshape(-1, 176)
    return _with_six_bits(raw, _unpack_nibbles(raw[:, 48:], 32) | _unpack_bits(raw[:, 16:48]) << 4)


def _with_six_bits(raw: Bytes, codes: Bytes) -> SuperBlocks:
    s, t = _unpack_scales_q4(raw[:, 4:16])
    return SuperBlocks(
        codes.astype(int), _halves(raw, 0), s.astype(int), _halves(raw, 2), t.astype(int)
    )


def _parse_q6_k(data: Bytes) -> SuperBlocks:
    raw = data.reshape(-1, 210)
    codes = _unpack_nibbles(raw[:, :128], 64) | _unpack_pairs(raw[:, 128:192]) << 4
    s = raw[:, 192:208].copy().view(np.int8).astype(int)
    return SuperBlocks(codes.astype(int) - 32, _halves(raw, 208), s)


def _assemble_q2_k(x: SuperBlocks) -> Bytes:
    scales = (x.s | _integers_of(x.t) << 4).astype(np.uint8)
    return np.concatenate([scales, _pack_pairs(_bytes(x.codes)), *_half_parts(x)], axis=1)


def _assemble_q3_k(x: SuperBlocks) -> Bytes:
    codes = _bytes(x.codes + 4)
    parts = [_pack_bits(codes >> 2), _pack_pairs(codes & 3), _pack_scales_q3(_bytes(x.s + 32))]
    return np.concatenate([*parts, *_half_parts(x)], axis=1)


def _assemble_q4_k(x: SuperBlocks) -> Bytes:
    scales = _pack_scales_q4(_bytes(x.s), _bytes(_integers_of(x.t)))
    return np.concatenate([*_half_parts(x), scales, _pack_nibbles(_bytes(x.codes), 32)], axis=1)


def _assemble_q5_k(x: SuperBlocks) -> Bytes:
    codes = _bytes(x.codes)
    scales = _pack_scales_q4(_bytes(x.s), _bytes(_integers_of(x.t)))
    parts = [scales, _pack_bits(codes >> 4), _pack_nibbles(codes & 15, 32)]
    return np.concatenate([*_half_parts(x), *parts], axis=1)


def _assemble_q6_k(x: SuperBlocks) -> Bytes:
    codes = _bytes(x.codes + 32)
    parts = [_pack_nibbles(codes & 15, 64), _pack_pairs(codes >> 4)]
    scales = x.s.astype(np.int8).view(np.uint8)
    return np.concatenate([*parts, scales, *_half_parts(x)], axis=1)


def _bytes(x: Ints) -> Bytes:
    return x.astype(np.uint8)


def _integers_of(t: Ints | None) -> Ints:
    assert t is not None
    return t.astype(int)


def _half_parts(x: SuperBlocks) -> list[Bytes]:
    return [_half_bytes(part) for part in (x.d, x.m) if part is not None]


def _divide(x: Floats, by: Floats) -> Floats:
    return np.divide(x, by, out=np.zeros(np.broadcast_shapes(x.shape, by.shape), np.float32),
                     where=by != 0)  # fmt: skip


def _integers(x: Floats, most: int) -> tuple[Floats, Ints]:
    """Non-negative x [blocks, groups] as d * integer: d [blocks, 1] in float16, integers."""
    d = (x.max(axis=1, keepdims=True) / most).astype("<f2").astype(np.float32)
    return d, np.clip(np.rint(_divide(x, d)), 0, most).astype(int)


def _with_minimums(flat: Floats, group: int, bits: int, most: int) -> SuperBlocks:
    """s and t up to ``most``."""
    groups = flat.reshape(-1, SUPER_BLOCK // group, group)
    low = np.minimum(groups.min(axis=2), 0)
    d, s = _integers((groups.max(axis=2) - low) / np.float32(2**bits - 1), most)
    m, t = _integers(-low, most)
    shifted = flat.reshape(-1, SUPER_BLOCK) + _spread(m * t)
    codes = np.clip(np.rint(_divide(shifted, _spread(d * s))), 0, 2**bits - 1)
    return SuperBlocks(codes.astype(int), d, s, m, t)


def _symmetric(flat: Floats, bits: int, most: int) -> SuperBlocks:
    """Groups of 16 with s up to ``most``."""
    zero = 2 ** (bits - 1)
    groups = flat.reshape(-1, 16, 16)
    d, s = _integers(np.abs(groups).max(axis=2) / np.float32(zero), most)
    codes = np.rint(_divide(flat.reshape(-1, SUPER_BLOCK), _spread(d * s)))
    return SuperBlocks(np.clip(codes, -zero, zero - 1).astype(int), d, s)


def encode(flat: Floats, dtype: str) -> Bytes:
    """u8 [blocks, bytes of a block]"""
    return _QUANTIZERS[dtype](flat).assemble(dtype)


_QUANTIZERS: dict[str, Callable[[Floats], SuperBlocks]] = {
    "q2_k": lambda flat: _with_minimums(flat, 16, 2, 15),
    "q3_k": lambda flat: _symmetric(flat, 3, 31),
    "q4_k": lambda flat: _with_minimums(flat, 32, 4, 63),
    "q5_k": lambda flat: _with_minimums(flat, 32, 5, 63),
    "q6_k": lambda flat: _symmetric(flat, 6, 127),
}
_PARSERS: dict[str, Callable[[Bytes], SuperBlocks]] = {
    "q2_k": _parse_q2_k,
    "q3_k": _parse_q3_k,
    "q4_k": _parse_q4_k,
    "q5_k": _parse_q5_k,
    "q6_k": _parse_q6_k,
}
_ASSEMBLERS: dict[str, Callable[[SuperBlocks], Bytes]] = {
    "q2_k": _assemble_q2_k,
    "q3_k": _assemble_q3_k,
    "q4_k": _assemble_q4_k,
    "q5_k": _assemble_q5_k,
    "q6_k": _assemble_q6_k,
}
