"""Paged attention of sequences with one query token.

    python bench/cuda/bench_decode_attention.py [--json FILE] [--ceilings FILE] [--small]

torch: scaled_dot_product_attention on keys and values without pages.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
from torch_peer import TorchPeer

from gpu_report import GpuReport, add_gpu_options
from rapshee_engine import _cuda_ops
from roofline import gpu_decode_attention

SHAPES = [(32, 8, 128), (16, 8, 128)]  # heads, KV heads, head size: Llama-3.1-8B, Qwen3-0.6B
CONTEXTS = [1024, 4096, 32768]
BATCHES = [1, 8, 64, 256]
SMALL = ([(4, 2, 64)], [40, 300], [1, 3])
BLOCK_SIZE = 64  # the engine's on CUDA

Floats = npt.NDArray[np.float32]


class Sequences:
    """Random keys and values of one KV shape in shuffled blocks."""

    def __init__(self, tokens: int, kv_heads: int, head_dim: int) -> None:
        self.num_blocks = -(-tokens // BLOCK_SIZE)
        self.cache = _cuda_ops.PagedCache(self.num_blocks, BLOCK_SIZE, kv_heads, head_dim)
        self.cache.fill_random(1)
        self._ids = np.random.default_rng(2).permutation(self.num_blocks).astype(np.int32)

    def tables(self, batch: int, context: int) -> npt.NDArray[np.int32]:
        width = -(-context // BLOCK_SIZE)
        return np.ascontiguousarray(self._ids[: batch * width].reshape(batch, width))


def tokens_of(batch: int, context: int) -> int:
    return batch * (-(-context // BLOCK_SIZE)) * BLOCK_SIZE


def queries(batch: int, heads: int, head_dim: int) -> Floats:
    return np.random.default_rng(3).standard_normal((batch, heads, head_dim), np.float32) * 4


def verify(context: int = 300) -> None:
    """Two sequences against float64."""
    heads, kv_heads, head_dim = 4, 2, 64
    sequences = Sequences(tokens_of(2, context), kv_heads, head_dim)
    tables, q = sequences.tables(2, context), queries(2, heads, head_dim)
    scale = head_dim**-0.5
    out = sequences.cache.decode(q, np.full(2, context, np.int32), tables, scale=scale)
    keys, values = sequences.cache.read()
    for row in range(2):
        k, v = (
            a[tables[row]].swapaxes(1, 2).reshape(-1, kv_heads, head_dim)[:context].astype(float)
            for a in (keys, values)
        )
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores = k[:, kv_head] @ q[row, head].astype(float) * scale
            weights = np.exp(scores - scores.max())
            expected = weights @ v[:, kv_head] / weights.sum()
            # Queries, weights and outputs are rounded to 8 bits.
            np.testing.assert_allclose(out[row, head], expected, rtol=2**-6, atol=2e-3)


def bench(
    report: GpuReport,
    torch: TorchPeer,
    sequences: Sequences,
    shape: tuple[int, int, int],
    batch: int,
    context: int,
    repeats: int,
) -> None:
    heads, kv_heads, head_dim = shape
    _, times = sequences.cache.decode(
        queries(batch, heads, head_dim),
        np.full(batch, context, np.int32),
        sequences.tables(batch, context),
        scale=head_dim**-0.5,
        repeats=repeats,
    )
    cost = gpu_decode_attention(batch, context, heads, kv_heads, head_dim)
    peer = torch.time(
        lambda torch: attention_of(torch, shape, batch, context),
        nbytes=cost.nbytes,
        repeats=repeats,
    )
    report.add(name_of(shape, batch, context), times, cost, torch_us=peer)


def attention_of(torch: Any, shape: tuple[int, int, int], batch: int, context: int) -> Any:
    heads, kv_heads, head_dim = shape

    def normal(count: int, tokens: int) -> Any:
        size = (batch, count, tokens, head_dim)
        return torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_()

    q, k, v = normal(heads, 1), normal(kv_heads, context), normal(kv_heads, context)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, enable_gqa=True)


def name_of(shape: tuple[int, int, int], batch: int, context: int) -> str:
    heads, kv_heads, head_dim = shape
    return f"decode attention {heads}/{kv_heads} x {head_dim}, batch {batch}, context {context}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_gpu_options(parser)
    options = parser.parse_args()
    report = GpuReport.from_options("kernels", options)
    torch = TorchPeer(not options.no_torch)
    shapes, contexts, batches = SMALL if options.small else (SHAPES, CONTEXTS, BATCHES)
    repeats = options.repeats or (1 if options.small else 20)
    with report.attempt("decode attention: correctness"):
        verify()
    for kv_shape in sorted({shape[1:] for shape in shapes}):
        with report.attempt(f"decode attention: cache of {kv_shape}"):
            tokens = tokens_of(max(batches), max(contexts))
            sequences = Sequences(tokens, *kv_shape)
            report.try_all(
                [
                    (
                        name_of(shape, batch, context),
                        partial(bench, report, torch, sequences, shape, batch, context, repeats),
                    )
                    for shape in shapes
                    if shape[1:] == kv_shape
                    for context in contexts
                    for batch in batches
                ]
            )
            del sequences
    return report.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
