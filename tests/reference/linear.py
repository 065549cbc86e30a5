"""Linear layers in numpy: what the kernels may round, and how far the result may be off.

Products come with an error bound: every order of n additions in float32 stays within
n * 2^-24 of the sum of magnitudes, so a kernel beyond it computes something else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reference.k_quants import K_QUANTS, SUPER_BLOCK, SuperBlocks
from reference.quant import BLOCK, round_trip

__all__ = [
    "Blocks",
    "Product",
    "QuantizedRows",
    "multiply",
    "multiply_bf16",
    "multiply_quantized",
    "quantize_rows",
]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_ROUNDING = 2.0**-24
# What the codes of a block of 32 are stored with.
_ZEROS = {"q4_0": 8, "q5_0": 16}
# Results below the normal numbers may be flushed to zero, as vdpbf16ps does.
_SMALLEST = 2.0**-126


@dataclass(frozen=True)
class Product:
    """x @ w.T as f64 [n, rows], and how far a float32 accumulation may be from it."""

    value: Doubles
    bound: Doubles

    def check(self, actual: Floats) -> None:
        """Assert that ``actual`` lies within the bound everywhere."""
        assert actual.shape == self.value.shape
        excess = np.abs(actual - self.value) - self.bound
        assert (excess <= 0).all(), f"beyond the bound by {excess.max()}"


@dataclass(frozen=True)
class Blocks:
    """A low-bit matrix by its parts.

    Attributes:
        codes: int [rows, cols], as they are multiplied: -8 to 7 (q4_0), 0 to 15 (q4_1), -128 to
            127 (q8_0).
        scales: f32 [rows, cols / group].
        minimums: the same, or None.
        raw: bytes that these are the parts of. Without them scales and minimums must be what
            float16 holds, and equal in the groups of a block of 256.
    """

    dtype: str
    codes: npt.NDArray[np.int64]
    scales: Floats
    minimums: Floats | None = None
    raw: bytes | None = None

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """Bytes of the tensor."""
        if self.raw is not None:
            return np.frombuffer(self.raw, np.uint8)
        if self.dtype in K_QUANTS:
            return self._super_blocks().assemble(self.dtype).reshape(-1)
        parts = [_halves(self.scales)]
        if self.minimums is not None:
            parts.append(_halves(self.minimums))
        codes = self.codes.reshape(*self.scales.shape, BLOCK)
        if self.dtype == "q8_0":
            parts.append(codes.astype(np.int8).view(np.uint8))
        else:
            unsigned = (codes + _ZEROS.get(self.dtype, 0)).astype(np.uint8)
            if self.dtype.startswith("q5"):
                parts.append(np.packbits(unsigned >> 4, axis=-1, bitorder="little"))
            parts.append(unsigned[..., :16] & 15 | (unsigned[..., 16:] & 15) << 4)
        return np.concatenate(parts, axis=-1).reshape(-1)

    def _super_blocks(self) -> SuperBlocks:
        codes = self.codes.reshape(-1, SUPER_BLOCK)
        ones = np.ones((len(codes), SUPER_BLOCK // self.group), np.int64)
        d = self.scales.reshape(ones.shape)[:, :1]
        if self.minimums is None:
            return SuperBlocks(codes, d, ones)
        return SuperBlocks(codes, d, ones, -self.minimums.reshape(ones.shape)[:, :1], ones)

    @property
    def values(self) -> Doubles:
        """f64 [rows, cols] that the matrix stands for."""
        values = self.codes * np.repeat(self.scales.astype(np.float64), self.group, axis=1)
        if self.minimums is None:
            return values
        return values + np.repeat(self.minimums, self.group, axis=1)

    @classmethod
    def parse(cls, data: bytes, dtype: str, rows: int) -> Blocks:
        """The parts of a tensor's bytes."""
        raw = np.frombuffer(data, np.uint8)
        if dtype in K_QUANTS:
            parts = SuperBlocks.parse(raw, dtype)
            minimums = None if parts.minimums is None else parts.minimums.reshape(rows, -1)
            codes, scales = parts.codes.reshape(rows, -1), parts.scales.reshape(rows, -1)
            return cls(dtype, codes, scales, minimums, data)
        header = 4 if dtype.endswith("_1") else 2
        high = 4 if dtype.startswith("q5") else 0
        size = header + high + (BLOCK if dtype == "q8_0" else BLOCK // 2)
        blocks = raw.reshape(rows, -1, size)
        halves = blocks[..., :header].copy().view("<f2").astype(np.float32)
        packed = blocks[..., header + high :].copy()
        if dtype == "q8_0":
            codes = packed.view(np.int8).astype(np.int64)
        else:
            codes = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int64)
            if high:
                fifth = blocks[..., header : header + high]
                codes += np.unpackbits(fifth, axis=-1, bitorder="little").astype(np.int64) * 16
            codes -= _ZEROS.get(dtype, 0)
        minimums = halves[..., 1] if header == 4 else None
        return cls(dtype, codes.reshape(rows, -1), halves[..., 0], minimums)


def _halves(values: Floats) -> npt.NDArray[np.uint8]:
    return values.astype("<f2")[..., None].view(np.uint8)


@dataclass(frozen=True)
class QuantizedRows:
    """Activations as int8.

    Attributes:
        codes: [n, cols], within +-127.
        scales: f32 [n, cols / 16], of each half of a block; equal in a block unless quantised
            finely.
    """

    codes: npt.NDArray[np.int64]
    scales: Floats

    @property
    def values(self) -> Doubles:
        return self.codes * np.repeat(self.scales.astype(np.float64), BLOCK // 2, axis=1)


def quantize_rows(x: Floats, fine: bool) -> QuantizedRows:
    """int8 codes of the rows of x [n, cols] with a scale per 32 columns, or per 16 (``fine``)."""
    width = BLOCK // 2 if fine else BLOCK
    parts = x.reshape(len(x), -1, width)
    most = np.abs(parts).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    codes = np.clip(np.rint(parts * inverse), -127, 127).astype(np.int64).reshape(x.shape)
    scales = (most / np.float32(127))[..., 0]
    return QuantizedRows(codes, scales if fine else np.repeat(scales, 2, axis=1))


def multiply(x: npt.ArrayLike, w: npt.ArrayLike) -> Product:
    """x [n, cols] times the transpose of w [rows, cols], accumulated in float32."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    magnitude = np.abs(x) @ np.abs(w).T
    # Two roundings an element where multiplication and addition are not fused, or where a weight
    # is dequantised on the way, and some at the end.
    bound = (2 * x.shape[1] + 4) * _ROUNDING * magnitude + x.shape[1] * _SMALLEST
    return Product(x @ w.T, bound)


def multiply_bf16(x: Floats, w: Floats) -> Product:
    """The same with both sides rounded to bf16."""
    return multiply(round_trip(x, "bf16"), round_trip(w, "bf16"))


def multiply_quantized(x: Floats, blocks: Blocks, fine: bool) -> Product:
    """int8 rows times a low-bit matrix: integer sums over (half) blocks, then float32."""
    rows = quantize_rows(x, fine)
    groups = np.arange(0, x.shape[1], BLOCK // 2)
    magnitude = np.zeros((len(x), len(blocks.codes)))
    per_scale = blocks.group // (BLOCK // 2)
    for half, first in enumerate(groups):
        columns = slice(first, first + BLOCK // 2)
        sums = rows.codes[:, columns] @ blocks.codes[:, columns].T
        scales = np.outer(rows.scales[:, half], blocks.scales[:, half // per_scale]).astype(
            np.float64
        )
        magnitude += np.abs(sums * scales)
        if blocks.minimums is not None:
            totals = np.abs(rows.codes[:, columns].sum(axis=1) * rows.scales[:, half])
            magnitude += np.outer(totals, np.abs(blocks.minimums[:, half // per_scale]))
    # Per half: the scale's product, the sum's, the addition; twice that with minimums.
    bound = (6 * len(groups) + 4) * _ROUNDING * magnitude + len(groups) * _SMALLEST
    return Product(rows.values @ blocks.values.T, bound)
