"""Linear layers of Llama-3.1-8B and Qwen3-0.6B.

    python bench/cuda/bench_linear.py [--json FILE] [--ceilings FILE] [--small]

torch: the product of bf16 matrices, also where the weights here have fewer bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt
from torch_peer import TorchPeer

from gpu_report import GpuReport, add_gpu_options
from rapshee_engine import _cuda_ops
from roofline import Cost, gpu_linear


class Layer(NamedTuple):
    """Matrices [outputs, cols] that share their input; gated: the first two are."""

    name: str
    outputs: tuple[int, ...]
    cols: int
    is_gated: bool = False


LAYERS = [
    Layer("8B qkv", (4096, 1024, 1024), 4096),
    Layer("8B o", (4096,), 4096),
    Layer("8B gate up", (14336, 14336), 4096, is_gated=True),
    Layer("8B down", (4096,), 14336),
    Layer("8B head", (128256,), 4096),
    Layer("0.6B qkv", (2048, 1024, 1024), 1024),
    Layer("0.6B o", (1024,), 2048),
    Layer("0.6B gate up", (3072, 3072), 1024, is_gated=True),
    Layer("0.6B down", (1024,), 3072),
    Layer("0.6B head", (151936,), 1024),
]
ROWS = [1, 8, 64, 256, 1024]
HEAD_ROWS = 256  # a step samples no more at a time
# Of those with one layout on the device (q4_k has q4_1's) one each, and how long their blocks are.
BLOCKS = {"bf16": 1, "q8_0": 32, "q4_0": 32, "q4_1": 32, "q5_k": 256, "q6_k": 256}
SMALL_LAYERS = [
    Layer("small qkv", (32, 16, 16), 256),
    Layer("small gate up", (48, 48), 160, is_gated=True),
]
SMALL_ROWS = [1, 9, 130]

Floats = npt.NDArray[np.float32]


def inputs(rows: int, cols: int) -> Floats:
    return np.random.default_rng(rows).standard_normal((rows, cols), np.float32)


def run(layer: Layer, weights: Sequence[Any], x: Floats, repeats: int) -> Any:
    if layer.is_gated:
        return _cuda_ops.gated_linear(x, *weights, repeats=repeats)
    splits = _cuda_ops.linear_splits(sum(layer.outputs), layer.cols)
    return _cuda_ops.linear(x, list(weights), splits=splits, repeats=repeats)


def verify() -> None:
    """One matrix against float64; rows have the same bits among few and many, for each dtype."""
    rows, outputs, cols = 9, 40, 160
    matrix = np.random.default_rng(0).standard_normal((outputs, cols), np.float32)
    matrix = (matrix.view(np.uint32) & 0xFFFF0000).view(np.float32)  # a bf16 each
    packed = (matrix.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).ravel()
    weight = _cuda_ops.PackedWeight(packed, "bf16", outputs, cols)
    x = np.round(inputs(rows, cols) * 16) / 16  # exact in bf16
    (y,) = _cuda_ops.linear(x, [weight])
    magnitude = np.abs(x).astype(float) @ np.abs(matrix).T
    error = np.abs(y - x.astype(float) @ matrix.T.astype(float))
    assert (error <= magnitude * 2**-18).all(), f"off by {(error / magnitude).max():.2g}"
    # Numbers of rows that go through each form of the kernel.
    for dtype, block in BLOCKS.items():
        cols = max(160, block)
        x = inputs(130, cols)
        weight = _cuda_ops.PackedWeight.random(1, dtype, outputs, cols)
        (many,) = _cuda_ops.linear(x, [weight])
        assert np.isfinite(many).all()
        for count in (1, 9, 70):
            (some,) = _cuda_ops.linear(x[:count], [weight])
            np.testing.assert_array_equal(some, many[:count])


def bench(
    report: GpuReport,
    layer: Layer,
    dtype: str,
    weights: Sequence[Any],
    rows: int,
    repeats: int,
    torch_us: float | None,
) -> None:
    _, times = run(layer, weights, inputs(rows, layer.cols), repeats)
    cost = Cost(0.0)
    for outputs in layer.outputs:
        cost += gpu_linear(rows, outputs, layer.cols, dtype)
    report.add(name_of(layer, dtype, rows), times, cost, torch_us=torch_us)


def product_of(torch: Any, layer: Layer, rows: int) -> Any:
    x, w = (
        torch.empty((count, layer.cols), dtype=torch.bfloat16, device="cuda").normal_()
        for count in (rows, sum(layer.outputs))
    )
    w = w.t()
    return lambda: torch.mm(x, w)


def name_of(layer: Layer, dtype: str, rows: int) -> str:
    return f"linear {layer.name} {sum(layer.outputs)} x {layer.cols} {dtype}, {rows} rows"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_gpu_options(parser)
    options = parser.parse_args()
    report = GpuReport.from_options("kernels", options)
    torch = TorchPeer(not options.no_torch)
    layers, all_rows = (SMALL_LAYERS, SMALL_ROWS) if options.small else (LAYERS, ROWS)
    repeats = options.repeats or (1 if options.small else 20)
    with report.attempt("linear: correctness"):
        verify()
    for layer in layers:
        chosen = [rows for rows in all_rows if rows <= HEAD_ROWS or "head" not in layer.name]
        peers = {
            rows: torch.time(
                partial(product_of, layer=layer, rows=rows),
                nbytes=2.0 * sum(layer.outputs) * layer.cols,
                repeats=repeats,
            )
            for rows in chosen
        }
        for dtype, block in BLOCKS.items():
            if layer.cols % block:
                continue
            with report.attempt(f"linear {layer.name} {dtype}: weights"):
                weights = [
                    _cuda_ops.PackedWeight.random(1 + i, dtype, outputs, layer.cols)
                    for i, outputs in enumerate(layer.outputs)
                ]
                report.try_all(
                    [
                        (
                            name_of(layer, dtype, rows),
                            partial(
                                bench, report, layer, dtype, weights, rows, repeats, peers[rows]
                            ),
                        )
                        for rows in chosen
                    ]
                )
    return report.exit_code()


if __name__ == "__main__":
    raise SystemExit(main())
