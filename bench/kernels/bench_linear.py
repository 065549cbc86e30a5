"""Matrix products with packed weights of every format.

    python bench/kernels/bench_linear.py [--threads N] [--json FILE]

A call also brings the rows into the form of the weights, on one thread. Caches are flushed before
each call: a model's weights come from memory in every step.
"""

from __future__ import annotations

import argparse
from functools import partial

import _path  # noqa: F401
import numpy as np
import numpy.typing as npt

from harness import CacheFlush, Report, add_options, measure
from rapshee_engine import _core
from roofline import Limits, linear

# [rows, cols] of SmolLM2-135M, then of Llama 3 8B.
SHAPES = [(576, 576), (1536, 576), (576, 1536), (4096, 4096), (14336, 4096), (4096, 14336)]
COUNTS = [1, 8, 32, 512]
# Low-bit blocks: values and bytes of one, and the float16 numbers in it, byte -> value.
_BLOCKS: dict[str, tuple[int, int, dict[int, float]]] = {
    "q4_1": (32, 20, {0: 0.2, 2: -1.5}),
    "q4_0": (32, 18, {0: 0.2}),
    "q5_0": (32, 22, {0: 0.1}),
    "q5_1": (32, 24, {0: 0.1, 2: -1.5}),
    "q8_0": (32, 34, {0: 0.0125}),
    "q2_k": (256, 84, {80: 0.1, 82: 0.1}),
    "q3_k": (256, 110, {108: 0.02}),
    "q4_k": (256, 144, {0: 0.006, 2: 0.05}),
    "q5_k": (256, 176, {0: 0.003, 2: 0.05}),
    "q6_k": (256, 210, {208: 0.0007}),
}
DTYPES = [*_BLOCKS, "bf16", "f32"]


def random_bytes(dtype: str, rows: int, cols: int) -> npt.NDArray[np.uint8]:
    """A matrix of random codes, its scales such that values are about 1."""
    random = np.random.default_rng(0)
    if dtype in ("f32", "bf16"):
        values = random.standard_normal(rows * cols, np.float32)
        bits = values.view(np.uint32)
        return (bits if dtype == "f32" else (bits >> 16).astype(np.uint16)).view(np.uint8)
    values, nbytes, halves = _BLOCKS[dtype]
    blocks = random.integers(0, 256, (rows * cols // values, nbytes), np.uint8)
    for at, number in halves.items():
        blocks[:, at : at + 2] = np.array([number], np.float16).view(np.uint8)
    return blocks.reshape(-1)


def verify(matrix: _core.PackedMatrix, x: npt.NDArray[np.float32], rows: int, isa: str) -> None:
    """Compare some columns with numpy: rounding x to int8 or bf16 moves a product of n terms of
    about 1 by some hundredths of the square root of n."""
    columns = np.linspace(0, rows - 1, 7).astype(int)
    weights = np.stack([matrix.row(int(i)) for i in columns])
    actual = matrix.multiply(x, isa=isa)[:, columns]
    np.testing.assert_allclose(actual, x @ weights.T, rtol=0, atol=0.1 * x.shape[1] ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES[:1], choices=DTYPES)
    options = parser.parse_args()
    report = Report(Limits.measure(options.threads, options.isa), options.json)
    flush = CacheFlush()
    random = np.random.default_rng(1)
    for dtype in options.dtypes:
        for rows, cols in SHAPES:
            if dtype in _BLOCKS and cols % _BLOCKS[dtype][0]:
                continue
            matrix = _core.PackedMatrix(random_bytes(dtype, rows, cols), dtype, rows, cols)
            for n in COUNTS:
                x = random.standard_normal((n, cols), np.float32)
                verify(matrix, x[:3], rows, options.isa)
                timing = measure(
                    partial(matrix.multiply, x, isa=options.isa, threads=options.threads),
                    before=flush,
                )
                report.add(
                    f"linear {dtype} {n} x {cols} x {rows}", timing, linear(n, rows, cols, dtype)
                )


if __name__ == "__main__":
    main()
