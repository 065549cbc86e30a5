"""bench/gpu.sh and the benchmarks of kernels, as far as they go without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_report
from gpu_table import GOALS

BENCH = Path(gpu_report.__file__).parent
KERNELS = ["decode_attention", "prefill_attention", "linear", "sampling", "elementwise"]
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("rapshee_engine._cuda_ops") is None,
    reason="built without RAPSHEE_CUDA_OPS",
)
CEILINGS = [{"ceiling": "memory", "value": 1e9}, {"ceiling": "matrix", "value": 1e12}]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_an_unknown_part_shows_the_usage() -> None:
    done = run(str(BENCH / "gpu.sh"), "build", "sing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: bench/gpu.sh [build|test|sanitize|ceilings|kernels|engine|peers]" in done.stderr


def test_parts_that_cannot_run_stop_no_other(tmp_path: Path) -> None:
    done = run(
        str(BENCH / "gpu.sh"), "ceilings", "kernels", OUT=str(tmp_path / "out"), PYTHON="false"
    )
    assert done.returncode == 1
    lines = (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    # Without ceilings the kernels ask for them once more.
    assert [step["step"] for step in steps] == [
        "ceilings",
        "ceilings",
        *(f"kernel {name}" for name in KERNELS),
    ]
    assert {step["status"] for step in steps} == {1}
    assert len(list((tmp_path / "out").iterdir())) <= 8


@needs_kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_is_verified_and_timed(kernel: str, tmp_path: Path) -> None:
    ceilings, file = tmp_path / "ceilings.jsonl", tmp_path / "kernels.jsonl"
    ceilings.write_text("".join(json.dumps(line) + "\n" for line in CEILINGS))
    done = run(
        sys.executable,
        str(BENCH / "cuda" / f"bench_{kernel}.py"),
        *("--small", "--no-torch", "--ceilings", str(ceilings), "--json", str(file)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) >= 2
    for record in records:
        assert record["median_us"] > 0
        assert record["share"] == pytest.approx(record["ceiling_us"] / record["median_us"])


@needs_kernels
def test_the_goals_are_among_the_results() -> None:
    """Names as the scripts make them for their full shapes."""
    script = """
import bench_decode_attention as decode, bench_linear as linear
import bench_prefill_attention as prefill, bench_sampling as sampling
names = [decode.name_of(s, b, c) for s in decode.SHAPES for b in decode.BATCHES
         for c in decode.CONTEXTS]
names += [prefill.name_of(s, n) for s in prefill.SHAPES for n in prefill.LENGTHS]
names += [linear.name_of(layer, d, n) for layer in linear.LAYERS for d in linear.BLOCKS
          for n in linear.ROWS]
names += [sampling.name_of(n, v, k) for n in sampling.ROWS for v in sampling.VOCABS
          for k in sampling.KINDS]
print("\\n".join(names))
"""
    path = os.pathsep.join([str(BENCH / "cuda"), *sys.path])
    names = run(sys.executable, "-c", script, PYTHONPATH=path).stdout.splitlines()
    models = ("llama-3.1-8b", "qwen3-0.6b")
    wanted = {goal.result for goal in GOALS if not goal.result.startswith(models)}
    assert len(names) > 100
    assert wanted <= set(names)
