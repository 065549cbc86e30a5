"""Attention of one KV head over a paged cache, on one thread.

    python bench/kernels/bench_paged_attention.py [--json FILE]

The cache of one head stays in the processor's caches between calls.
"""

from __future__ import annotations

import argparse
from functools import partial

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt

from harness import Report, add_options, measure
from rapshee_engine import _core
from roofline import Limits, paged_attention

# (group, head_dim) of SmolLM2-135M and of Llama 3 8B.
MODELS = [(3, 64), (4, 128)]
DTYPES = ["bf16", "int8", "f32"]
CONTEXTS = [128, 1024, 4096]
# Query tokens of a tile: decode, and a chunk of a prompt.
TILES = [1, 8]

Floats = npt.NDArray[np.float32]


def verify(out: Floats, q: Floats, k: Floats, v: Floats, scale: float) -> None:
    """Compare the last query, which sees all keys, with numpy."""
    scores = q[-1] @ k.T * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True) @ v
    np.testing.assert_allclose(out[-1], expected, rtol=0, atol=0.02)


def bench(report: Report, dtype: str, group: int, dim: int, length: int, isa: str) -> None:
    random = np.random.default_rng(0)
    k, v = (random.standard_normal((length, dim), np.float32) for _ in range(2))
    table = random.permutation(-(-length // 16)).astype(np.int32)
    cache = _core.PagedCache(k, v, table, dtype=dtype, isa=isa)
    scale = dim**-0.5
    for tokens in TILES:
        q = random.standard_normal((tokens, group, dim), np.float32)
        positions = np.arange(length - tokens, length, dtype=np.int32)
        verify(cache.attend(q, positions, scale=scale), q, k, v, scale)
        timing = measure(partial(cache.attend, q, positions, scale=scale))
        cost = paged_attention(float((positions + 1).sum()), length, group, dim, tokens, dtype)
        name = f"attention {dtype} {tokens} x {group} x {dim}, {length} keys"
        report.add(name, timing, cost, cached=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, threads=False)
    options = parser.parse_args()
    report = Report(Limits.measure(1, options.isa), options.json)
    for dtype in DTYPES:
        for group, dim in MODELS:
            for length in CONTEXTS:
                bench(report, dtype, group, dim, length, options.isa)


if __name__ == "__main__":
    main()
