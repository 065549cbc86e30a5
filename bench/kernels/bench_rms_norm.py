"""RMSNorm of rows, on one thread.

python bench/kernels/bench_rms_norm.py [--json FILE]
"""

from __future__ import annotations

import argparse
from functools import partial

import _path  # noqa: F401
import numpy as np

from harness import Report, add_options, measure
from rapshee_engine import _core
from roofline import Limits, rms_norm

SIZES = [576, 4096]
COUNTS = [1, 32, 512]
EPS = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, threads=False)
    options = parser.parse_args()
    report = Report(Limits.measure(1, options.isa), options.json)
    random = np.random.default_rng(0)
    for size in SIZES:
        weight = random.standard_normal(size, np.float32)
        for n in COUNTS:
            x = random.standard_normal((n, size), np.float32)
            expected = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + EPS) * weight
            actual = _core.op_rms_norm(x, weight, EPS, isa=options.isa)
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
            timing = measure(partial(_core.op_rms_norm, x, weight, EPS, isa=options.isa))
            report.add(f"rms_norm {n} x {size}", timing, rms_norm(n, size), cached=True)


if __name__ == "__main__":
    main()
