"""What lies between the matrices: norms, rotation and cache writes, activations, embeddings.

    python bench/cuda/bench_elementwise.py [--json FILE] [--ceilings FILE] [--small]

torch: the operations one after the other; none for rotation and cache writes.
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
from roofline import (
    gpu_embed,
    gpu_gated_activation,
    gpu_rms_norm,
    gpu_rope_kv_write,
    gpu_scale_logits,
)

ROWS = [1, 64, 1024]
HIDDEN = [4096, 1024]
INTERMEDIATE = [14336, 3072]
# Heads, KV heads, head size, norms: of each head, or of a row.
HEADS = [(32, 8, 128, ""), (16, 8, 128, "norms"), (32, 8, 128, "row norms")]
TABLES = [(128256, 4096), (151936, 1024)]
SMALL = ([1, 5], [72], [40], [(4, 2, 16, "norms"), (4, 2, 16, "row norms")], [(50, 64)])
SPLITS = 2
BLOCK_SIZE = 64
EPS = 1e-6

Floats = npt.NDArray[np.float32]


def normal(*shape: int) -> Floats:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def verify_norm() -> None:
    x, partials, weight = normal(3, 200), normal(2, 3, 200), normal(200)
    out, stream = _cuda_ops.add_rms_norm(x, partials, weight, eps=EPS)
    total = x + partials.sum(axis=0, dtype=np.float64)
    expected = total / np.sqrt((total**2).mean(axis=1, keepdims=True) + EPS) * weight
    np.testing.assert_allclose(stream, total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out, expected, rtol=2**-7, atol=1e-6)


def verify_activation() -> None:
    gate_up = normal(3, 80)
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    out = _cuda_ops.gated_activation(gate_up, activation="silu")
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=2**-7, atol=1e-6)


def verify_rope() -> None:
    """Queries of one head turn by their cosines and sines; values come to their slots."""
    rows, head_dim = 4, 16
    qkv = normal(1, rows, 3 * head_dim)
    angles = normal(rows, head_dim // 2)
    cache = _cuda_ops.PagedCache(1, BLOCK_SIZE, 1, head_dim)
    slots = np.array([5, 0, 63, 7], np.int64)
    q = cache.write(qkv, slots, np.cos(angles), np.sin(angles))
    first, second = np.split(qkv[0, :, :head_dim], 2, axis=1)
    expected = np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ],
        axis=1,
    )
    np.testing.assert_allclose(q[:, 0], expected, rtol=2**-7, atol=1e-5)
    _, values = cache.read()
    np.testing.assert_allclose(
        values[0, 0, slots], qkv[0, :, 2 * head_dim :], rtol=2**-7, atol=1e-6
    )


def bench_norm(
    report: GpuReport, torch: TorchPeer, name: str, rows: int, hidden: int, repeats: int
) -> None:
    weight = normal(hidden)
    *_, times = _cuda_ops.add_rms_norm(
        normal(rows, hidden), normal(SPLITS, rows, hidden) * 1e-3, weight, eps=EPS, repeats=repeats
    )
    cost = gpu_rms_norm(rows, hidden, SPLITS)

    def make(torch: Any) -> Any:
        x = torch.randn((rows, hidden), device="cuda")
        partials = torch.randn((SPLITS, rows, hidden), device="cuda") * 1e-3
        scale = torch.randn(hidden, device="cuda")

        def call() -> Any:
            x.add_(partials.sum(dim=0))
            return torch.nn.functional.rms_norm(x, (hidden,), scale, EPS).bfloat16()

        return call

    peer = torch.time(make, nbytes=2 * cost.nbytes, repeats=repeats)
    report.add(name, times, cost, torch_us=peer)


def bench_both_norms(report: GpuReport, name: str, rows: int, hidden: int, repeats: int) -> None:
    weight = normal(hidden)
    *_, times = _cuda_ops.add_rms_norm(
        normal(rows, hidden),
        normal(SPLITS, rows, hidden),
        weight,
        post_weight=weight * 1e-3,
        eps=EPS,
        repeats=repeats,
    )
    report.add(name, times, gpu_rms_norm(rows, hidden, SPLITS, norms=2))


def bench_scale_logits(report: GpuReport, name: str, rows: int, vocab: int, repeats: int) -> None:
    _, times = _cuda_ops.scale_logits(normal(rows, vocab), softcap=30.0, repeats=repeats)
    report.add(name, times, gpu_scale_logits(rows, vocab))


def bench_activation(
    report: GpuReport, torch: TorchPeer, name: str, rows: int, size: int, repeats: int
) -> None:
    _, times = _cuda_ops.gated_activation(
        normal(rows, 2 * size), activation="silu", repeats=repeats
    )
    cost = gpu_gated_activation(rows, size)

    def make(torch: Any) -> Any:
        gate, up = torch.randn((2, rows, size), device="cuda")
        return lambda: (torch.nn.functional.silu(gate) * up).bfloat16()

    peer = torch.time(make, nbytes=2 * cost.nbytes, repeats=repeats)
    report.add(name, times, cost, torch_us=peer)


def bench_rope(
    report: GpuReport,
    name: str,
    rows: int,
    heads: tuple[int, int, int, str],
    repeats: int,
) -> None:
    num_heads, kv_heads, head_dim, norms = heads
    blocks = -(-rows // BLOCK_SIZE)
    cache = _cuda_ops.PagedCache(blocks, BLOCK_SIZE, kv_heads, head_dim)
    angles = normal(rows, head_dim // 2)
    options: dict[str, Any] = {}
    if norms:
        of_row = norms == "row norms"
        sizes = (num_heads, kv_heads) if of_row else (1, 1)
        q_norm, k_norm = (normal(head_dim * size) for size in sizes)
        options = {"q_norm": q_norm, "k_norm": k_norm, "eps": EPS, "row_norm": of_row}
    slots = np.random.default_rng(0).permutation(blocks * BLOCK_SIZE)[:rows].astype(np.int64)
    _, times = cache.write(
        normal(SPLITS, rows, (num_heads + 2 * kv_heads) * head_dim),
        slots,
        np.cos(angles),
        np.sin(angles),
        repeats=repeats,
        **options,
    )
    report.add(name, times, gpu_rope_kv_write(rows, num_heads, kv_heads, head_dim, SPLITS))


def bench_embed(
    report: GpuReport, torch: TorchPeer, name: str, rows: int, table: Any, repeats: int
) -> None:
    vocab, hidden, weight = table
    ids = np.random.default_rng(0).integers(0, vocab, rows).astype(np.int32)
    _, times = _cuda_ops.embed(weight, ids, repeats=repeats)

    def make(torch: Any) -> Any:
        values = torch.empty((vocab, hidden), dtype=torch.bfloat16, device="cuda").normal_()
        on_device = torch.from_numpy(ids).cuda()
        return lambda: torch.nn.functional.embedding(on_device, values).float()

    peer = torch.time(make, nbytes=2.0 * vocab * hidden, repeats=repeats)
    report.add(name, times, gpu_embed(rows, hidden, "bf16"), torch_us=peer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_gpu_options(parser)
    options = parser.parse_args()
    report = GpuReport.from_options("kernels", options)
    torch = TorchPeer(not options.no_torch)
    sizes = SMALL if options.small else (ROWS, HIDDEN, INTERMEDIATE, HEADS, TABLES)
    all_rows, hidden_sizes, inner_sizes, head_shapes, tables = sizes
    repeats = options.repeats or (1 if options.small else 30)
    report.try_all(
        [
            ("add + rms norm: correctness", verify_norm),
            ("gated activation: correctness", verify_activation),
            ("rope + cache write: correctness", verify_rope),
        ]
    )
    for rows in all_rows:
        for hidden in hidden_sizes:
            name = f"add {SPLITS} partials + rms norm, {rows} x {hidden}"
            with report.attempt(name):
                bench_norm(report, torch, name, rows, hidden, repeats)
            name = f"norm {SPLITS} partials + add + rms norm, {rows} x {hidden}"
            with report.attempt(name):
                bench_both_norms(report, name, rows, hidden, repeats)
        for size in inner_sizes:
            name = f"gated activation, {rows} x {size}"
            with report.attempt(name):
                bench_activation(report, torch, name, rows, size, repeats)
        for heads in head_shapes:
            norms = f", {heads[3]}" if heads[3] else ""
            name = f"rope + cache write {heads[0]}/{heads[1]} x {heads[2]}{norms}, {rows} rows"
            with report.attempt(name):
                bench_rope(report, name, rows, heads, repeats)
    for vocab, hidden in tables:
        for rows in all_rows[:2]:  # a step samples no more than 256 rows at a time
            name = f"scale logits, {rows} x {vocab}"
            with report.attempt(name):
                bench_scale_logits(report, name, rows, vocab, repeats)
        with report.attempt(f"embedding {vocab} x {hidden}: table"):
            weight = _cuda_ops.Weight("half", "bf16", vocab, hidden)
            weight.fill_random(1)
            report.try_all(
                [
                    (
                        f"embedding {vocab} x {hidden}, {rows} rows",
                        partial(
                            bench_embed,
                            report,
                            torch,
                            f"embedding {vocab} x {hidden}, {rows} rows",
                            rows,
                            (vocab, hidden, weight),
                            repeats,
                        ),
                    )
                    for rows in all_rows
                ]
            )
    return report.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
