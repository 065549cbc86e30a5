"""Rotary embedding of halves, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["rotate"]

Floats = npt.NDArray[np.float32]


def rotate(heads: Floats, cos: Floats, sin: Floats) -> npt.NDArray[np.float64]:
    """heads [n, d]; pair (i, i + half) turns by the angle of cos[i], sin[i]; dimensions from
    2 * half on stay as they are."""
    half = len(cos)
    out = heads.astype(np.float64)
    first, second = out[:, :half].copy(), out[:, half : 2 * half].copy()
    out[:, :half] = first * cos - second * sin
    out[:, half : 2 * half] = second * cos + first * sin
    return out
