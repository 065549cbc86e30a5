from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from harness import CacheFlush, Report, Timing, add_options, environment, measure
from rapshee_engine import _core
from roofline import Cost, Limits

LIMITS = Limits(threads=2, isa="avx2", memory=10e9, cache=100e9, peak={"int8": 1e12, "f32": 1e11})


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float, name: str) -> None:
        self.now += seconds
        self.calls.append(name)


def test_percentiles() -> None:
    timing = Timing.of([float(i) for i in range(11)])
    assert timing == Timing(median=5.0, p10=1.0, p90=9.0, repeats=11)


def test_calls_are_repeated_until_they_took_long_enough() -> None:
    clock = Clock()
    timing = measure(lambda: clock.work(0.125, "call"), seconds=1.0, warm_up=3, clock=clock)
    assert timing == Timing(0.125, 0.125, 0.125, repeats=8)
    assert clock.calls == ["call"] * 11


def test_long_calls_are_repeated_a_few_times() -> None:
    clock = Clock()
    timing = measure(
        lambda: clock.work(60.0, "call"), seconds=1.0, min_repeats=4, warm_up=0, clock=clock
    )
    assert timing.repeats == len(clock.calls) == 4


def test_what_comes_before_a_call_is_not_measured() -> None:
    clock = Clock()
    timing = measure(
        lambda: clock.work(0.5, "call"),
        before=lambda: clock.work(7.0, "before"),
        seconds=0.0,
        min_repeats=2,
        warm_up=1,
        clock=clock,
    )
    assert timing.median == 0.5
    assert clock.calls == ["before", "call"] * 3


def test_the_warm_up_does_not_count() -> None:
    clock = Clock()
    seconds = iter([100.0, 100.0, 1.0, 1.0, 1.0])
    timing = measure(
        lambda: clock.work(next(seconds), "call"), seconds=3.0, min_repeats=1, clock=clock
    )
    assert timing == Timing(1.0, 1.0, 1.0, repeats=3)


def test_a_flush_touches_more_than_the_caches_hold() -> None:
    flush = CacheFlush()
    flush()
    flush()
    assert flush._memory.nbytes >= 64 << 20
    assert (flush._memory == 2).all()


def test_a_report_prints_a_line_and_appends_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    timing = Timing(median=2e-3, p10=1e-3, p90=3e-3, repeats=7)
    report = Report(LIMITS, file)
    # 1 ms at 10 GB/s, and less in arithmetic.
    report.add("decode", timing, Cost(10e6, {"int8": 1e6}), tokens=4)
    report.add("warm", timing, Cost(10e6), cached=True)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first["name"] == "decode"
    assert first["share"] == pytest.approx(0.5)
    assert first["bound"] == "memory"
    assert first["gb_per_s"] == pytest.approx(5.0)
    assert first["gflop_per_s"] == pytest.approx(0.5)
    assert first["tokens_per_s"] == pytest.approx(2000)
    assert first["limit_tokens_per_s"] == pytest.approx(4000)
    assert first["limits"]["memory"] == 10e9
    assert {"device", "commit", "compiler", "version"} < first.keys()
    assert second["bound"] == "cache"
    assert second["share"] == pytest.approx(0.05)
    assert "tokens_per_s" not in second
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("device=")
    assert printed[1] == str(LIMITS)
    assert [field.strip() for field in printed[3].split("|")] == [
        "decode", "2000.0", "5.0", "0.5", "50% of memory", "2000 tok/s of 4000",
        "p10 1000.0, p90 3000.0, n 7",
    ]  # fmt: skip


def test_a_report_without_a_file_only_prints(capsys: pytest.CaptureFixture[str]) -> None:
    Report(LIMITS).add("op", Timing(1.0, 1.0, 1.0, 1), Cost(1.0))
    assert capsys.readouterr().out.splitlines()[-1].startswith("op ")


def test_the_environment_names_device_and_build() -> None:
    info = environment()
    assert info["device"] == _core.build_info()["cpu"]
    assert info["version"] == _core.__version__
    assert info["commit"]


def test_options() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    defaults = parser.parse_args([])
    assert (defaults.threads, defaults.isa, defaults.json) == (_core.usable_cores(), "", None)
    given = parser.parse_args(["--threads", "3", "--isa", "scalar", "--json", "out.json"])
    assert (given.threads, given.isa, given.json) == (3, "scalar", Path("out.json"))


def test_operations_of_one_thread_have_no_threads_option() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, threads=False)
    assert not hasattr(parser.parse_args([]), "threads")
