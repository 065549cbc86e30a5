"""RMSNorm and the gated activation, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["rms_norm", "silu_mul"]

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
