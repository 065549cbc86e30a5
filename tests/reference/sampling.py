"""What sampling must compute, written for reading: float64, full sorts, one row at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

__all__ = [
    "RowOptions",
    "log_probs",
    "philox4x32_10",
    "plausible_tokens",
    "process",
    "rank_of",
    "sample",
    "survivor_probs",
    "top_ids",
    "uniform",
]

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """Sampling options of one row. ``allowed``: bool [V]; ``prompt`` and ``output``: the tokens
    that the penalties refer to."""

    target_id: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    draw_index: int = 0
    num_logprobs: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: npt.NDArray[np.bool_] | None = None
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Ten rounds of Philox (Salmon et al., SC 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, draw_index: int) -> float:
    """53 bits of the block keyed by the seed, in [0, 1)."""
    low, high, _, _ = philox4x32_10((draw_index, 0, 0, 0), (seed & _WORD, seed >> 32))
    return ((high << 32 | low) >> 11) / 2.0**53


def log_probs(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-softmax."""
    x = logits.astype(np.float64)
    shifted = x - x.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def rank_of(logits: npt.NDArray[np.float32], token: int) -> int:
    """1 for the most likely token; equals share the best rank."""
    return 1 + int((logits > logits[token]).sum())


def top_ids(logits: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.intp]:
    """The n most likely tokens, best first, ties by id."""
    return np.argsort(-logits, kind="stable")[:n]


def process(logits: npt.NDArray[np.float32], row: RowOptions) -> npt.NDArray[np.float32]:
    """Mask, bias and penalties, in float32 like the kernels, so that ties are theirs."""
    x = logits.copy()
    if row.allowed is not None:
        x[~row.allowed] = -np.inf
    for token, value in row.bias.items():
        x[token] += np.float32(value)
    seen = np.array(sorted({*row.prompt, *row.output}), dtype=np.intp)
    penalty = np.float32(row.repetition_penalty)
    with np.errstate(over="ignore"):
        x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    for token in sorted(set(row.output)):
        x[token] -= np.float32(row.frequency_penalty) * np.float32(row.output.count(token))
        x[token] -= np.float32(row.presence_penalty)
    return np.asarray(np.minimum(x, np.finfo(np.float32).max))


def survivor_probs(x: npt.NDArray[np.float32], row: RowOptions) -> npt.NDArray[np.float64]:
    """Probabilities to draw from, given processed logits: temperature, min-p, top-k, top-p. Some
    logit must be finite and the temperature positive."""
    with np.errstate(over="ignore"):
        weights = np.exp((x.astype(np.float64) - np.float64(x.max())) / row.temperature)
    kept = (x > -np.inf) & (weights >= row.min_p)
    if 0 < row.top_k < kept.sum():
        kept &= x >= np.sort(x[kept])[-row.top_k]
    if row.top_p < 1.0:
        descending = np.sort(x[kept])[::-1]
        mass = np.cumsum(np.sort(weights[kept])[::-1])
        last = np.searchsorted(mass, row.top_p * mass[-1])
        kept &= x >= descending[min(last, len(descending) - 1)]
    weights[~kept] = 0.0
    return np.asarray(weights / weights.sum())


def sample(logits: npt.NDArray[np.float32], row: RowOptions, u: float | None = None) -> int:
    """The token of the row; -1 where there is none. ``u`` replaces the row's uniform."""
    if not np.isfinite(logits).all():
        return -1
    if row.target_id >= 0:
        return row.target_id
    x = process(logits, row)
    if x.max() == -np.inf:
        return -1
    if row.temperature == 0.0:
        return int(x.argmax())
    return _token_at(survivor_probs(x, row), uniform(row.seed, row.draw_index) if u is None else u)


def plausible_tokens(
    logits: npt.NDArray[np.float32], row: RowOptions, eps: float = 2e-6
) -> set[int]:
    """Tokens that the row may give if masses are off by a relative ``eps``: a float32
    exponential may move the edges of the distribution by so much."""
    u = uniform(row.seed, row.draw_index)
    tokens = set()
    for factor in (1.0 - eps, 1.0, 1.0 + eps):
        top_p = row.top_p if row.top_p == 1.0 else min(row.top_p * factor, 1.0 - 1e-9)
        min_p = row.min_p if row.min_p in (0.0, 1.0) else row.min_p * factor
        near = replace(row, top_p=top_p, min_p=min_p)
        tokens |= {sample(logits, near, min(max(u + du, 0.0), 1.0)) for du in (-eps, 0.0, eps)}
    return tokens


def _token_at(probs: npt.NDArray[np.float64], u: float) -> int:
    index = int(np.searchsorted(np.cumsum(probs), u, side="right"))
    return min(index, int(probs.nonzero()[0][-1]))
