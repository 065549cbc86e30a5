"""The ceilings of a GPU: copy and read bandwidth, matrix product, launch latencies.

    python bench/cuda/measure_ceilings.py --json FILE

Builds ``ceilings.cu`` with nvcc and runs it; torch does the matrix product. Where there is no nvcc,
torch's copy is the bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _path  # noqa: F401

from gpu_report import gpu_environment

SOURCE = Path(__file__).with_name("ceilings.cu")
MATRIX = 8192
COPY_BYTES = 4 << 30  # read and written together
_WARM_UP, _REPEATS = 3, 20
_BUILD_SECONDS, _RUN_SECONDS = 60, 30

Line = dict[str, Any]


def by_own_kernels() -> list[Line]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        build = ["nvcc", "-O3", "-std=c++20", "-arch=native", str(SOURCE), "-o", str(program)]
        subprocess.run(build, check=True, timeout=_BUILD_SECONDS)
        done = subprocess.run(
            [str(program)], check=True, timeout=_RUN_SECONDS, stdout=subprocess.PIPE, text=True
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_torch_copy() -> list[Line]:
    import torch

    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    seconds = _seconds(torch, lambda: target.copy_(source))
    what = "bytes/s of a copy by torch, read and written"
    return [{"ceiling": "memory", "what": what, "value": COPY_BYTES / seconds}]


def by_torch_product() -> list[Line]:
    import torch

    a, b = torch.randn((2, MATRIX, MATRIX), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)
    seconds = _seconds(torch, lambda: torch.mm(a, b, out=out))
    what = f"operations/s of torch.mm of bf16 matrices [{MATRIX}, {MATRIX}]"
    return [{"ceiling": "matrix", "what": what, "value": 2.0 * MATRIX**3 / seconds}]


def _seconds(torch: Any, call: Any) -> float:
    times = []
    for i in range(_WARM_UP + _REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= _WARM_UP:
            times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def attempt(measure: Any) -> list[Line]:
    try:
        return measure()
    except Exception as error:  # what is left still counts
        print(f"{measure.__name__}: {error}", file=sys.stderr)
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a ceiling")
    options = parser.parse_args()
    lines = attempt(by_own_kernels)
    if not any(line["ceiling"] == "memory" and line["value"] for line in lines):
        lines += attempt(by_torch_copy)
    lines += attempt(by_torch_product)
    environment = gpu_environment()
    print(" ".join(f"{key}={value}" for key, value in environment.items()))
    for line in lines:
        print(f"{line['ceiling']:<24} {line['value'] or float('nan'):>12.4g}  {line['what']}")
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(json.dumps({"part": "ceilings", **line, **environment}) + "\n")
    found = {line["ceiling"] for line in lines if line["value"]}
    missing = {"memory", "matrix", "launch"} - found
    if missing:
        print(f"not measured: {', '.join(sorted(missing))}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
