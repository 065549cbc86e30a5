"""Times calls and reports them beside the machine's limits."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rapshee_engine import _core
from roofline import Cost, Limits

__all__ = ["CacheFlush", "Report", "Timing", "add_options", "measure"]

_FLUSH_BYTES = 64 << 20  # twice a large last-level cache
_HEADER = f"{'':<46} | {'us':>10} | {'GB/s':>7} | {'GFLOP/s':>8} | % of limit"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile of ``repeats`` calls."""

    median: float
    p10: float
    p90: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        p10, median, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
        return cls(median, p10, p90, len(seconds))


class CacheFlush:
    """Throws everything else out of the caches."""

    def __init__(self) -> None:
        self._memory = np.zeros(_FLUSH_BYTES // 8, np.int64)

    def __call__(self) -> None:
        self._memory += 1


def measure(
    call: Callable[[], object],
    *,
    seconds: float = 0.5,
    min_repeats: int = 5,
    warm_up: int = 2,
    before: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Call until the calls have taken ``seconds``, and ``min_repeats`` times at least.

    ``before`` runs before each call, unmeasured. The first ``warm_up`` calls do not count: they
    touch memory for the first time and wake threads.
    """
    times: list[float] = []
    total = 0.0
    while len(times) < warm_up + min_repeats or total < seconds:
        if before is not None:
            before()
        start = clock()
        call()
        times.append(clock() - start)
        if len(times) > warm_up:
            total += times[-1]
    return Timing.of(times[warm_up:])


def add_options(parser: argparse.ArgumentParser, *, threads: bool = True) -> None:
    """``--threads`` (where more than one makes a difference), ``--isa`` and ``--json``."""
    if threads:
        cores = _core.usable_cores()
        parser.add_argument("--threads", type=int, default=cores, help="default: all cores")
    parser.add_argument(
        "--isa", default="", choices=_core.build_info()["isas"], help="default: the best one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a result")


class Report:
    """Prints one line a result, and appends it to a file of JSON lines."""

    def __init__(self, limits: Limits, json_file: Path | None = None) -> None:
        self._limits = limits
        self._json_file = json_file
        self._environment = environment()
        print(" ".join(f"{key}={value}" for key, value in self._environment.items()))
        print(limits)
        print(_HEADER)

    def add(
        self,
        name: str,
        timing: Timing,
        cost: Cost,
        *,
        cached: bool = False,
        tokens: int | None = None,
    ) -> None:
        """A result: ``name`` says operation and shape, ``tokens`` how many a call handles."""
        record = self._record(name, timing, cost, cached, tokens)
        line = (
            f"{name:<46} | {timing.median * 1e6:>10.1f} | {record['gb_per_s']:>7.1f} | "
            f"{record['gflop_per_s']:>8.1f} | {record['share']:>4.0%} of {record['bound']}"
        )
        if tokens is not None:
            line += f" | {record['tokens_per_s']:.0f} tok/s of {record['limit_tokens_per_s']:.0f}"
        spread = f"p10 {timing.p10 * 1e6:.1f}, p90 {timing.p90 * 1e6:.1f}, n {timing.repeats}"
        print(f"{line} | {spread}", flush=True)
        if self._json_file is not None:
            with self._json_file.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _record(
        self, name: str, timing: Timing, cost: Cost, cached: bool, tokens: int | None
    ) -> dict[str, Any]:
        limit, bound = self._limits.seconds(cost, cached=cached)
        record: dict[str, Any] = {
            "name": name,
            "median_us": timing.median * 1e6,
            "p10_us": timing.p10 * 1e6,
            "p90_us": timing.p90 * 1e6,
            "repeats": timing.repeats,
            "gb_per_s": cost.nbytes / timing.median / 1e9,
            "gflop_per_s": cost.total_operations / timing.median / 1e9,
            "limit_us": limit * 1e6,
            "bound": bound,
            "share": limit / timing.median,
        }
        if tokens is not None:
            record["tokens_per_s"] = tokens / timing.median
            record["limit_tokens_per_s"] = tokens / limit
        return record | self._environment | {"limits": asdict(self._limits)}


def environment() -> dict[str, str]:
    """Device, version, compiler and commit."""
    info = _core.build_info()
    return {
        "device": str(info["cpu"]),
        "version": str(info["version"]),
        "compiler": str(info["compiler"]),
        "commit": _commit(),
    }


def _commit() -> str:
    """Of the source tree; with a + where it has changes, ``unknown`` outside a repository."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
