"""Paged attention of whole prompts.

    python bench/cuda/bench_prefill_attention.py [--json FILE] [--ceilings FILE] [--small]

torch: causal scaled_dot_product_attention on keys and values without pages.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import _path  # noqa: F401
import numpy as np
from bench_decode_attention import Sequences, queries, tokens_of
from torch_peer import TorchPeer

from gpu_report import GpuReport, add_gpu_options
from roofline import gpu_prefill_attention

SHAPES = [(32, 8, 128), (16, 8, 128)]
LENGTHS = [1024, 8192]
SMALL = ([(4, 2, 64)], [33, 130])


def prefill(sequences: Sequences, heads: int, head_dim: int, length: int, repeats: int) -> Any:
    return sequences.cache.prefill(
        queries(length, heads, head_dim),
        np.array([0, length], np.int32),
        np.arange(length, dtype=np.int32),
        sequences.tables(1, length),
        scale=head_dim**-0.5,
        repeats=repeats,
    )


def verify(length: int = 150) -> None:
    """A prompt against float64."""
    heads, kv_heads, head_dim = 4, 2, 64
    sequences = Sequences(tokens_of(1, length), kv_heads, head_dim)
    out, q = prefill(sequences, heads, head_dim, length, 0), queries(length, heads, head_dim)
    (table,) = sequences.tables(1, length)
    k, v = (
        a[table].swapaxes(1, 2).reshape(-1, kv_heads, head_dim)[:length].astype(float)
        for a in sequences.cache.read()
    )
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        scores = q[:, head].astype(float) @ k[:, kv_head].T * head_dim**-0.5
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = weights @ v[:, kv_head] / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out[:, head], expected, rtol=2**-6, atol=3e-3)


def bench(
    report: GpuReport, torch: TorchPeer, shape: tuple[int, int, int], length: int, repeats: int
) -> None:
    heads, kv_heads, head_dim = shape
    sequences = Sequences(tokens_of(1, length), kv_heads, head_dim)
    _, times = prefill(sequences, heads, head_dim, length, repeats)
    cost = gpu_prefill_attention(length, heads, kv_heads, head_dim)
    peer = torch.time(
        lambda torch: attention_of(torch, shape, length), nbytes=cost.nbytes, repeats=repeats
    )
    report.add(name_of(shape, length), times, cost, torch_us=peer)


def attention_of(torch: Any, shape: tuple[int, int, int], length: int) -> Any:
    heads, kv_heads, head_dim = shape
    q, k, v = (
        torch.empty((1, count, length, head_dim), dtype=torch.bfloat16, device="cuda").normal_()
        for count in (heads, kv_heads, kv_heads)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True, enable_gqa=True)


def name_of(shape: tuple[int, int, int], length: int) -> str:
    heads, kv_heads, head_dim = shape
    return f"prefill attention {heads}/{kv_heads} x {head_dim}, {length} tokens"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_gpu_options(parser)
    options = parser.parse_args()
    report = GpuReport.from_options("kernels", options)
    torch = TorchPeer(not options.no_torch)
    shapes, lengths = SMALL if options.small else (SHAPES, LENGTHS)
    repeats = options.repeats or (1 if options.small else 10)
    with report.attempt("prefill attention: correctness"):
        verify()
    report.try_all(
        [
            (name_of(shape, length), partial(bench, report, torch, shape, length, repeats))
            for shape in shapes
            for length in lengths
        ]
    )
    return report.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
