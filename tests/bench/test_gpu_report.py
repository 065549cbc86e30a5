from __future__ import annotations

import json
from pathlib import Path

import pytest

import gpu_report
from gpu_report import GpuReport, gpu_environment, load_ceilings
from gpu_table import GOALS, failures, goal_table, read, step_table
from roofline import Cost, GpuLimits

LIMITS = GpuLimits(memory=4e12, read=4.5e12, matrix=800e12, launch=2e-6)
LINES = [
    {"ceiling": "memory", "what": "copy", "value": 4e12},
    {"ceiling": "matrix", "what": "torch.mm", "value": 8e14},
    {"ceiling": "launch", "what": "empty kernel", "value": 2e-6},
    {"ceiling": "read", "what": "read", "value": None, "error": "out of memory"},
    {"ceiling": "graph_kernel", "what": "in a graph", "value": 1e-6},
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "_output", lambda command: "")  # noqa: ARG005


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_ceilings_are_read_from_lines(tmp_path: Path) -> None:
    limits = load_ceilings(write_lines(tmp_path / "ceilings.jsonl", LINES))
    assert limits == GpuLimits(memory=4e12, read=0.0, matrix=8e14, launch=2e-6)


def test_missing_ceilings_cost_the_shares_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_ceilings(None) is None
    assert load_ceilings(tmp_path / "none.jsonl") is None
    assert load_ceilings(write_lines(tmp_path / "no_copy.jsonl", LINES[1:])) is None
    assert "no line with the ceiling 'memory'" in capsys.readouterr().err
    GpuReport("kernels", None).add("op", [10.0], Cost(1e6), torch_us=20.0)
    fields = [field.strip() for field in capsys.readouterr().out.splitlines()[-1].split("|")]
    assert fields == ["op", "10.0", "100", "0.0", "-", "2.00"]


def test_the_slowest_of_moving_computing_and_launching_is_the_limit() -> None:
    assert LIMITS.seconds(Cost(4e8, {"bf16": 8e9})) == (1e-4, "memory")
    assert LIMITS.seconds(Cost(4e8, {"bf16": 8e10, "f16": 8e10})) == (2e-4, "arithmetic")
    assert LIMITS.seconds(Cost(4.0, {"bf16": 8.0})) == (2e-6, "launch")
    assert GpuLimits(memory=1.0).seconds(Cost(2.0, {"bf16": 1e30})) == (2.0, "memory")


def test_a_result_is_a_line_and_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kernels.jsonl"
    report = GpuReport("kernels", LIMITS, file)
    report.add("linear", [400.0, 200.0, 100.0], Cost(4e8, {"bf16": 8e9}), torch_us=300.0, rows=1)
    record = json.loads(file.read_text())
    assert record["part"] == "kernels"
    assert record["name"] == "linear"
    assert record["median_us"] == 200.0
    assert record["gb_per_s"] == pytest.approx(2000.0)
    assert record["tflop_per_s"] == pytest.approx(40.0)
    assert record["share"] == pytest.approx(0.5)
    assert record["x_torch"] == pytest.approx(1.5)
    assert record["rows"] == 1
    assert record["limits"]["memory"] == 4e12
    assert {"device", "commit", "compiler", "nvcc", "driver", "date"} < record.keys()
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == str(LIMITS)
    fields = [field.strip() for field in printed[-1].split("|")]
    assert fields == ["linear", "200.0", "2000", "40.0", "50% of memory", "1.50"]


def test_what_fails_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.jsonl"
    report = GpuReport("kernels", None, file)

    def fail() -> None:
        raise ValueError("not so\nmore")

    report.try_all([("first", fail), ("second", lambda: report.add("second", [1.0], Cost(1.0)))])
    assert report.exit_code() == 1
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["name"] for record in records] == ["first", "second"]
    assert records[0]["error"] == "not so\nmore"
    assert "FAILED: not so" in capsys.readouterr().out
    assert failures(records) == ["FAILED first: not so"]


def test_the_environment_names_gpu_driver_and_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "nvidia-smi": "NVIDIA H200, 580.1\nNVIDIA H200, 580.1\n",
        "nvcc": "nvcc: NVIDIA (R)\nCuda compilation tools, release 13.0, V13.0.88\n",
    }
    monkeypatch.setattr(gpu_report, "_output", lambda command: answers[command[0]])
    monkeypatch.setenv("RAPSHEE_COMMIT", "abc")
    found = gpu_environment()
    assert (found["device"], found["driver"], found["nvcc"]) == ("NVIDIA H200", "580.1", "V13.0.88")
    assert found["commit"] == "abc"
    assert found["date"].endswith("+00:00")


def test_without_a_gpu_the_environment_is_that_of_the_cpu() -> None:
    assert gpu_environment()["device"]
    assert gpu_environment()["driver"] == ""


def test_goals_stand_beside_what_was_measured() -> None:
    decode, rate = GOALS[0].result, "qwen3-0.6b decode, 64 rows, context 1024"
    sampling = "sampling temperature, 256 x 128256"
    records = [
        {"name": decode, "share": 0.5},
        {"name": decode, "share": 0.85},  # the latest counts
        {"name": rate, "tokens_per_s": 26000.0, "share": 0.7},
        {"name": sampling, "median_us": 101.0, "share": 0.3},
        {"name": GOALS[1].result, "error": "it broke"},
    ]
    rows = {
        fields[0]: fields[1:]
        for fields in ([f.strip() for f in line.split("|")] for line in goal_table(records))
    }
    assert rows[decode] == ["85", "80", "90", "% of ceiling", "85%, first reached"]
    assert rows[rate] == ["26000", "19000", "25000", "tok/s", "70%, both reached"]
    assert rows[sampling] == ["101", "100", "60", "us", "30%"]
    assert rows[GOALS[1].result][-1] == "FAILED"
    assert rows["llama-3.1-8b prefill, 1024 tokens"][-1] == "not measured"


def test_lines_cut_off_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text(
        '{"step": "build", "status": 0, "seconds": 9}\n'
        '{"step": "racecheck", "status": 124, "seconds": 57}\n{"step": "te'
    )
    lines = [[f.strip() for f in line.split("|")] for line in step_table(read(tmp_path))]
    assert lines[1:] == [["build", "ok", "9"], ["racecheck", "too long", "57"]]
