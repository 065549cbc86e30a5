"""The gated activation silu(gate) * up, on one thread.

    python bench/kernels/bench_silu_mul.py [--json FILE]

A call also copies the gate, which the engine overwrites.
"""

from __future__ import annotations

import argparse
from functools import partial

import _path  # noqa: F401
import numpy as np

from harness import Report, add_options, measure
from rapshee_engine import _core
from roofline import Limits, silu_mul

# One token of SmolLM2-135M, of Llama 3 8B, and 512 of the first.
SIZES = [1536, 14336, 512 * 1536]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, threads=False)
    options = parser.parse_args()
    report = Report(Limits.measure(1, options.isa), options.json)
    random = np.random.default_rng(0)
    for size in SIZES:
        gate, up = (random.standard_normal(size, np.float32) for _ in range(2))
        actual = _core.op_silu_mul(gate, up, isa=options.isa)
        np.testing.assert_allclose(actual, gate / (1 + np.exp(-gate)) * up, rtol=1e-5)
        timing = measure(partial(_core.op_silu_mul, gate, up, isa=options.isa))
        report.add(f"silu_mul {size}", timing, silu_mul(size), cached=True)


if __name__ == "__main__":
    main()
