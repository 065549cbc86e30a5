"""The last table of bench/gpu.sh: what ran, the ceilings, and the goals beside what was measured.

python bench/gpu_table.py FOLDER
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["GOALS", "Goal", "goal_table"]

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure to reach on an H200.

    Attributes:
        result: name of the result.
        key: of its record.
        unit: in which ``first`` and ``then`` are given.
        factor: from the record to the unit.
        first, then: the goals. Of times they are upper bounds, of everything else lower ones.
    """

    result: str
    key: str
    unit: str
    factor: float
    first: float
    then: float

    @property
    def is_time(self) -> bool:
        return self.unit == "us"

    @property
    def label(self) -> str:
        return f"{self.result}, host" if self.key == "host_us" else self.result


def _shares(result: str, first: float, then: float) -> Goal:
    return Goal(result, "share", "% of ceiling", 100.0, first, then)


def _rate(result: str, first: float, then: float) -> Goal:
    return Goal(result, "tokens_per_s", "tok/s", 1.0, first, then)


def _microseconds(result: str, key: str, first: float, then: float) -> Goal:
    return Goal(result, key, "us", 1.0, first, then)


_LLAMA, _QWEN = "llama-3.1-8b", "qwen3-0.6b"

GOALS = [
    _shares("decode attention 32/8 x 128, batch 64, context 4096", 80, 90),
    Goal("prefill attention 32/8 x 128, 8192 tokens", "tflop_per_s", "TFLOP/s", 1.0, 280, 500),
    _shares("linear 8B gate up 28672 x 4096 bf16, 1 rows", 85, 92),
    _shares("linear 8B gate up 28672 x 4096 bf16, 8 rows", 85, 92),
    _shares("linear 8B gate up 28672 x 4096 bf16, 64 rows", 80, 92),
    _shares("linear 8B down 4096 x 14336 bf16, 1 rows", 85, 92),
    _shares("linear 8B down 4096 x 14336 bf16, 8 rows", 85, 92),
    _shares("linear 8B down 4096 x 14336 bf16, 64 rows", 80, 92),
    _microseconds("sampling temperature, 256 x 128256", "median_us", 100, 60),
    _microseconds("sampling top-k + top-p, 256 x 128256", "median_us", 100, 60),
    _rate(f"{_LLAMA} decode, 1 rows, context 1024", 190, 240),
    _rate(f"{_LLAMA} decode, 64 rows, context 1024", 8200, 9300),
    _rate(f"{_LLAMA} decode, 256 rows, context 1024", 14000, 17800),
    _rate(f"{_LLAMA} prefill, 1024 tokens", 25000, 43000),
    _rate(f"{_QWEN} decode, 1 rows, context 1024", 900, 2000),
    _rate(f"{_QWEN} decode, 64 rows, context 1024", 19000, 25000),
    _rate(f"{_QWEN} decode, 256 rows, context 1024", 23000, 29000),
    _rate(f"{_QWEN} workload, 256 requests", 22000, 28000),
    _microseconds(f"{_LLAMA} decode, 256 rows, context 1024", "host_us", 300, 0),
    _microseconds(f"{_QWEN} decode, 1 rows, context 1024", "host_us", 300, 0),
    _microseconds(f"{_QWEN} decode, 256 rows, context 1024", "host_us", 300, 0),
]


def read(folder: Path) -> list[Record]:
    """The lines of all files of the folder; a line that was cut off by a limit is left out."""
    records = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def step_table(records: list[Record]) -> list[str]:
    lines = [f"{'step':<32} | result      | seconds"]
    for record in records:
        if "step" not in record:
            continue
        status = record["status"]
        result = {0: "ok", 124: "too long", 137: "too long", 127: "not there"}.get(
            status, f"failed ({status})"
        )
        lines.append(f"{record['step']:<32} | {result:<11} | {record['seconds']:>7}")
    return lines


def ceiling_table(records: list[Record]) -> list[str]:
    return [
        f"{record['ceiling']:<24} | {record['value'] or float('nan'):>10.4g} | {record['what']}"
        for record in records
        if "ceiling" in record
    ]


def goal_table(records: list[Record]) -> list[str]:
    """Each goal beside the latest result of its name."""
    results = {record["name"]: record for record in records if "name" in record}
    lines = [
        f"{'goal (of an H200)':<54} | {'measured':>9} | {'first':>7} | {'then':>7} | "
        f"{'unit':<12} | % of ceiling"
    ]
    for goal in GOALS:
        record = results.get(goal.result, {})
        measured, verdict = "-", "not measured"
        if "error" in record:
            verdict = "FAILED"
        elif record.get(goal.key) is not None:
            value = record[goal.key] * goal.factor
            measured = f"{value:.0f}"
            share = None if goal.key == "host_us" else record.get("share")
            verdict = "-" if share is None else f"{share:.0%}"
            verdict += _reached(goal, value)
        lines.append(
            f"{goal.label:<54} | {measured:>9} | {goal.first:>7.0f} | {goal.then:>7.0f} | "
            f"{goal.unit:<12} | {verdict}"
        )
    return lines


def _reached(goal: Goal, value: float) -> str:
    for target, words in ((goal.then, ", both reached"), (goal.first, ", first reached")):
        if value <= target if goal.is_time else value >= target:
            return words
    return ""


def failures(records: list[Record]) -> list[str]:
    return [
        f"FAILED {record['name']}: {record['error'].splitlines()[0][:160]}"
        for record in records
        if record.get("error") and "name" in record
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="OUT of bench/gpu.sh")
    records = read(parser.parse_args().folder)
    origins = {
        f"{record['device']}, driver {record['driver']}, nvcc {record['nvcc']}, "
        f"commit {record['commit']}"
        for record in records
        if "driver" in record
    }
    sections = [
        sorted(origins),
        step_table(records),
        ceiling_table(records),
        failures(records),
        goal_table(records),
    ]
    print("\n\n".join("\n".join(lines) for lines in sections if lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
