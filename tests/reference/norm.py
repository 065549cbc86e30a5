"""RMSNorm, gated activations and soft caps, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["gelu_mul", "rms_norm", "silu_mul", "soft_cap"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def rms_norm(x: Floats, weight: Floats, eps: float) -> Doubles:
    """Rows of x [n, d] over their root mean square, times weight [d]."""
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + eps) * weight


def silu_mul(gate: Floats, up: Floats) -> Doubles:
    """gate * sigmoid(gate) * up, elementwise."""
    wide = gate.astype(np.float64)
    return wide / (1.0 + np.exp(-wide)) * up


def gelu_mul(gate: Floats, up: Floats) -> Doubles:
    """gelu(gate) * up, elementwise, GELU by its tanh approximation."""
    wide = gate.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    # gate / 2 * (1 + tanh(inner)) without the cancellation at negative values.
    return wide / (1.0 + np.exp(np.minimum(-2.0 * inner, 700.0))) * up


def soft_cap(x: Floats, scale: float, cap: float) -> Doubles:
    wide = x.astype(np.float64) * scale
    return np.asarray(cap * np.tanh(wide / cap)) if cap else wide
