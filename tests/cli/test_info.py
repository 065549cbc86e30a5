"""``info``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import cli
from rapshee_engine.cli import info


def test_info(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert cli.main(["info"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    shown = {name: value.strip() for name, value in lines.items()}
    assert shown["version"]
    assert shown["isa"] in shown["isas"].split(", ")
    assert "cpu" in shown["devices"].split(", ")
    assert shown["running sequences"] == "64 (--max-num-seqs)"
    assert shown["state"] == str(home / "home")
    assert shown["default model"].endswith("(not downloaded yet)")


@pytest.mark.parametrize(
    ("cuda", "shown"),
    [
        (False, "not in this build (-C cmake.define.RAPSHEE_CUDA=ON builds it)"),
        (
            {"kind": "cuda", "devices": ["NVIDIA H200 (sm_90, 139 GiB)"] * 2, "unavailable": ""},
            "NVIDIA H200 (sm_90, 139 GiB), NVIDIA H200 (sm_90, 139 GiB)",
        ),
        (
            {"kind": "cuda", "devices": [], "unavailable": "driver 12.4 is older than 13.0"},
            "no device: driver 12.4 is older than 13.0",
        ),
        (
            {"kind": "cuda-emu", "devices": ["emulator"], "unavailable": ""},
            "emulated, for tests: emulator",
        ),
    ],
)
def test_info_says_what_there_is_of_cuda(
    cuda: Any, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "build_info", lambda: {"version": "1", "cuda": cuda})
    assert cli.main(["info"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["cuda"].strip() == shown
