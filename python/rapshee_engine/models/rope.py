"""Inverse frequencies of rotary embeddings (RoFormer, arXiv 2104.09864), with their scalings.

Computed in float32 in the order of transformers' ``modeling_rope_utils.py``, so that angles at
large positions agree with those that the checkpoints were trained and evaluated with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["linear_inv_freq", "llama3_inv_freq", "plain_inv_freq", "with_factors"]

FloatArray = npt.NDArray[np.float32]


def plain_inv_freq(theta: float, rotated_dim: int) -> FloatArray:
    """``theta ** (-2 i / rotated_dim)``, f32 [rotated_dim / 2]."""
    exponents = np.arange(0, rotated_dim, 2, dtype=np.float32) / np.float32(rotated_dim)
    # The power is rounded once, from double: float32 powers differ between math libraries.
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    inv_freq: FloatArray = np.float32(1.0) / powers
    return inv_freq


def linear_inv_freq(inv_freq: FloatArray, factor: float) -> FloatArray:
    """Position interpolation (arXiv 2306.15595): positions divided by ``factor``."""
    interpolated: FloatArray = inv_freq / np.float32(factor)
    return interpolated


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
    """Each frequency divided by its own factor (``rope_freqs.weight`` of GGUF files)."""
    divided: FloatArray = np.divide(inv_freq, np.asarray(factors, dtype=np.float32))
    return divided
