"""Reports of the benchmarks of CUDA kernels and of whole engines on a GPU.

A line a result, beside the ceilings of the same run, and a JSON line where a file is given. What
fails is a result too: the next one is measured all the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import harness
from roofline import Cost, GpuLimits, Limits

__all__ = ["GpuReport", "add_gpu_options", "gpu_environment", "load_ceilings"]

_HEADER = (
    f"{'shape':<58} | {'us':>10} | {'GB/s':>6} | {'TFLOP/s':>7} | % of ceiling       | x torch"
)


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--ceilings``, ``--small``, ``--no-torch`` and ``--repeats``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a result")
    parser.add_argument(
        "--ceilings",
        type=Path,
        metavar="FILE",
        help="written by measure_ceilings.py in the same run; without it no shares are printed",
    )
    parser.add_argument(
        "--small", action="store_true", help="a few tiny shapes, for checkers and emulation"
    )
    parser.add_argument("--no-torch", action="store_true", help="do not time torch beside it")
    parser.add_argument("--repeats", type=int, default=None, help="runs of each kernel")


def gpu_environment() -> dict[str, str]:
    """Device, driver, compilers, commit (``RAPSHEE_COMMIT`` where there is no repository), date."""
    environment = harness.environment()
    name, driver = _nvidia_smi()
    commit = os.environ.get("RAPSHEE_COMMIT") or environment["commit"]
    return environment | {
        "device": name or environment["device"],
        "driver": driver,
        "nvcc": _nvcc(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def load_ceilings(path: Path | None) -> GpuLimits | None:
    """None without a file. One that cannot be read is reported, and costs the shares only."""
    if path is None:
        return None
    try:
        return GpuLimits.load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"no ceilings: {error}", file=sys.stderr)
        return None


class GpuReport:
    """Results of one script; ``limits`` None: without shares; ``environment`` None: the GPU's."""

    def __init__(
        self,
        part: str,
        limits: GpuLimits | Limits | None,
        json_file: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._part = part
        self._limits = limits
        self._json_file = json_file
        self._environment = gpu_environment() if environment is None else environment
        self._has_header = False
        self.num_failed = 0
        print(" ".join(f"{key}={value}" for key, value in self._environment.items()))
        print(limits or "ceilings: none measured", flush=True)

    @classmethod
    def from_options(cls, part: str, options: argparse.Namespace) -> GpuReport:
        """By the options of `add_gpu_options`."""
        return cls(part, load_ceilings(options.ceilings), options.json)

    def add(
        self,
        name: str,
        microseconds: Sequence[float],
        cost: Cost,
        *,
        torch_us: float | None = None,
        **more: Any,
    ) -> None:
        """A kernel: ``name`` says operation and shape. ``more`` goes to the JSON line."""
        if not self._has_header:
            print(_HEADER)
            self._has_header = True
        p10, median, p90 = np.percentile(microseconds, [10, 50, 90]).tolist()
        record = {
            "median_us": median,
            "p10_us": p10,
            "p90_us": p90,
            "repeats": len(microseconds),
            "gb_per_s": cost.nbytes / median / 1e3,
            "tflop_per_s": cost.total_operations / median / 1e6,
        }
        share = "-"
        if self._limits is not None:
            limit, bound = self._limits.seconds(cost)
            record |= {"ceiling_us": limit * 1e6, "bound": bound, "share": limit * 1e6 / median}
            share = f"{record['share']:.0%} of {bound}"
        faster = "-"
        if torch_us is not None:
            record |= {"torch_us": torch_us, "x_torch": torch_us / median}
            faster = f"{record['x_torch']:.2f}"
        print(
            f"{name:<58} | {median:>10.1f} | {record['gb_per_s']:>6.0f} | "
            f"{record['tflop_per_s']:>7.1f} | {share:<18} | {faster}",
            flush=True,
        )
        self.write({"name": name, **record, **more})

    def write(self, record: dict[str, Any]) -> None:
        """A line of JSON, with where it comes from."""
        if self._json_file is None:
            return
        limits = None if self._limits is None else asdict(self._limits)
        line = {"part": self._part, **record, **self._environment, "limits": limits}
        with self._json_file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What is raised inside is a failed result; the next one follows."""
        try:
            yield
        except Exception as error:
            self.num_failed += 1
            traceback.print_exc()
            text = str(error).strip() or type(error).__name__
            print(f"{name:<58} | FAILED: {text.splitlines()[0]}", flush=True)
            self.write({"name": name, "error": text[:2000]})

    def try_all(self, cases: Sequence[tuple[str, Callable[[], None]]]) -> None:
        for name, run in cases:
            with self.attempt(name):
                run()

    def exit_code(self) -> int:
        return 1 if self.num_failed else 0


def _nvidia_smi() -> tuple[str, str]:
    """Name of the first GPU and its driver, empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    first, *_ = [*_output(query).splitlines(), ""]
    name, _, driver = first.partition(",")
    return name.strip(), driver.strip()


def _nvcc() -> str:
    """Its release, e.g. ``V13.0.48``."""
    words = _output(["nvcc", "--version"]).split()
    return next((word for word in words if word.startswith("V") and word[1:2].isdigit()), "")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
