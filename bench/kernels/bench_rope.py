"""Rotary embedding of heads, on one thread.

    python bench/kernels/bench_rope.py [--json FILE]

A call also copies the heads, which the engine rotates in place.
"""

from __future__ import annotations

import argparse
from functools import partial

import _path  # noqa: F401
import numpy as np

from harness import Report, add_options, measure
from rapshee_engine import _core
from roofline import Limits, rope

HEAD_DIMS = [64, 128]
COUNTS = [12, 512, 8192]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, threads=False)
    options = parser.parse_args()
    report = Report(Limits.measure(1, options.isa), options.json)
    random = np.random.default_rng(0)
    for dim in HEAD_DIMS:
        angles = random.uniform(0, 6, dim // 2)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        for n in COUNTS:
            x = random.standard_normal((n, dim), np.float32)
            first, second = np.split(x, 2, axis=1)
            expected = np.hstack([first * cos - second * sin, second * cos + first * sin])
            actual = _core.op_rope(x, cos, sin, isa=options.isa)
            np.testing.assert_allclose(actual, expected, atol=1e-5)
            timing = measure(partial(_core.op_rope, x, cos, sin, isa=options.isa))
            report.add(f"rope {n} x {dim}", timing, rope(n, dim), cached=True)


if __name__ == "__main__":
    main()
