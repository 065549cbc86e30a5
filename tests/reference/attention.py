"""Causal attention over a whole sequence, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["attention"]

Floats = npt.NDArray[np.float32]


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    positions: npt.NDArray[np.int32],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Outputs [T, group, d] of queries q [T, group, d] at ``positions`` over keys and values
    [L, d], and the same with the magnitudes of the values, which errors are relative to.

    ``window``: keys that a query sees, its own included; 0: all up to its own. ``softcap``: scores
    become softcap * tanh(score / softcap); 0: they do not.
    """
    scores = np.einsum("tgd,ld->tgl", q.astype(np.float64), k.astype(np.float64)) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    distance = positions[:, None] - np.arange(len(k))[None, :]
    visible = (distance >= 0) & (distance < (window or len(k)))
    scores = np.where(visible[:, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    values = v.astype(np.float64)
    return weights @ values, weights @ np.abs(values)
