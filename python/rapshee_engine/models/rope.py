"""Inverse frequencies of rotary embeddings (RoFormer, arXiv 2104.09864), with their scalings.

Computed in float32 in the order of transformers' ``modeling_rope_utils.py``, so that angles at
large positions agree with those that the checkpoints were trained and evaluated with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "FloatArray",
    "dynamic_inv_freq",
    "linear_inv_freq",
    "llama3_inv_freq",
    "longrope_attention_factor",
    "plain_inv_freq",
    "with_factors",
    "yarn_attention_factor",
    "yarn_inv_freq",
]

FloatArray = npt.NDArray[np.float32]


def _powers(theta: float, rotated_dim: int) -> FloatArray:
    """``theta ** (2 i / rotated_dim)``, f32 [rotated_dim / 2]."""
    exponents = np.arange(0, rotated_dim, 2, dtype=np.float32) / np.float32(rotated_dim)
    # The power is rounded once, from double: float32 powers differ between math libraries.
    powers: FloatArray = np.power(np.float64(theta), exponents.astype(np.float64)).astype(
        np.float32
    )
    return powers


def plain_inv_freq(theta: float, rotated_dim: int) -> FloatArray:
    """``theta ** (-2 i / rotated_dim)``, f32 [rotated_dim / 2]."""
    inv_freq: FloatArray = np.float32(1.0) / _powers(theta, rotated_dim)
    return inv_freq


def linear_inv_freq(inv_freq: FloatArray, factor: float) -> FloatArray:
    """Position interpolation (arXiv 2306.15595): positions divided by ``factor``."""
    interpolated: FloatArray = inv_freq / np.float32(factor)
    return interpolated


def dynamic_inv_freq(
    theta: float, rotated_dim: int, *, factor: float, length: int, trained_length: int
) -> FloatArray:
    """ "Dynamic NTK": a base that grows with the length beyond the trained one. ``rotated_dim`` is
    above 2."""
    grown = factor * max(length, trained_length) / trained_length - (factor - 1.0)
    return plain_inv_freq(theta * grown ** (rotated_dim / (rotated_dim - 2)), rotated_dim)


def yarn_inv_freq(
    theta: float,
    rotated_dim: int,
    *,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> FloatArray:
    """YaRN (arXiv 2309.00071): dimensions that turn more than ``beta_fast`` times over the original
    length are kept, those that turn less than ``beta_slow`` times divided by ``factor``, others
    blended. ``truncate``: the bounds are whole dimensions. ``theta`` is above 1."""

    def dimension_of(turns: float) -> float:
        ratio = original_length / (turns * 2 * math.pi)
        return rotated_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension_of(beta_fast), dimension_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated_dim - 1)
    if low == high:
        high += 0.001
    powers = _powers(theta, rotated_dim)
    kept_whole, stretched = (
        np.float32(1.0) / powers,
        np.float32(1.0) / (np.float32(factor) * powers),
    )
    steps = np.arange(rotated_dim // 2, dtype=np.float32)
    ramp = np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1.0) - ramp
    blended: FloatArray = stretched * (np.float32(1.0) - kept) + kept_whole * kept
    return blended


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """What YaRN multiplies cos and sin with; ``mscale`` counts beside ``mscale_all_dim`` only."""

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def longrope_attention_factor(factor: float, original_length: int) -> float:
    """What LongRoPE (arXiv 2402.13753) multiplies cos and sin with; ``original_length`` above 1."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


def llama3_inv_freq(
    inv_freq: FloatArray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: int,
) -> FloatArray:
    """Llama 3.1's scaling: wavelengths over ``original_context / low_freq_factor`` are stretched
    by ``factor``, those under ``original_context / high_freq_factor`` kept, others blended."""
    wavelengths = np.float32(2 * math.pi) / inv_freq
    smooth = np.float32(original_context) / wavelengths - np.float32(low_freq_factor)
    smooth /= np.float32(high_freq_factor - low_freq_factor)
    stretched = inv_freq / np.float32(factor)
    blended = (np.float32(1.0) - smooth) * stretched + smooth * inv_freq
    is_long = wavelengths > np.float32(original_context / low_freq_factor)
    is_short = wavelengths < np.float32(original_context / high_freq_factor)
    return np.where(is_long, stretched, np.where(is_short, inv_freq, blended))


def with_factors(inv_freq: FloatArray, factors: Sequence[float]) -> FloatArray:
    """Each frequency divided by its own factor: LongRoPE, and ``rope_freqs.weight`` of GGUF."""
    divided: FloatArray = np.divide(inv_freq, np.asarray(factors, dtype=np.float32))
    return divided
