from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench_engine
from bench_engine import Workload, config_folder
from rapshee_engine.weights.loader import load_checkpoint
from reference.tiny_llama import make_config

BENCH = Path(bench_engine.__file__)


def test_the_workload_is_that_of_nano_vllm() -> None:
    work = Workload.draw(256, 100, 1024, vocab_size=151936)
    assert sum(map(len, work.prompts)) == 142827
    assert sum(work.max_tokens) == 133966
    assert max(max(ids) for ids in work.prompts) == 10000


@pytest.mark.parametrize(
    ("name", "weight_bytes", "kv_bytes"),
    [("qwen3-0.6b", 1.192e9, 112 << 10), ("llama-3.1-8b", 16.06e9, 128 << 10)],
)
def test_configurations_have_the_published_sizes(
    name: str, weight_bytes: float, kv_bytes: int
) -> None:
    checkpoint = load_checkpoint(str(config_folder(name)), "dummy")
    config = checkpoint.config
    assert checkpoint.weight_bytes == pytest.approx(weight_bytes, rel=1e-3)
    assert config.num_layers * config.num_kv_heads * config.head_dim * 4 == kv_bytes


def test_an_unknown_configuration_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"'gpt' is neither llama-3\.1-8b, qwen3-0\.6b nor"):
        config_folder("gpt")


def test_every_case_on_a_tiny_model(tmp_path: Path) -> None:
    folder, file = tmp_path / "tiny", tmp_path / "engine.jsonl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_config()))
    command = [sys.executable, str(BENCH), "--device", "cpu", "--small"]
    command += ["--config", str(folder), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {r["name"]: r for r in map(json.loads, file.read_text().splitlines())}
    assert records.keys() == {
        "tiny decode, 1 rows, context 20",
        "tiny decode, 3 rows, context 20",
        "tiny prefill, 8 tokens",
        "tiny first token, 8 tokens",
        "tiny prefill, 20 tokens",
        "tiny first token, 20 tokens",
        "tiny workload, 4 requests",
        "tiny start to first token",
    }
    for record in records.values():
        assert record["seconds"] > 0
        assert record["floor_seconds"] > 0
        assert record["share"] == pytest.approx(record["floor_seconds"] / record["seconds"])
    decode = records["tiny decode, 3 rows, context 20"]
    assert decode["tokens_per_s"] == pytest.approx(3 / decode["seconds"])
    assert decode["host_us"] == pytest.approx(
        max(0.0, decode["seconds"] * 1e6 - decode["device_us"])
    )
    workload = records["tiny workload, 4 requests"]
    assert workload["num_preemptions"] == 0
    assert workload["num_steps"] >= 8
