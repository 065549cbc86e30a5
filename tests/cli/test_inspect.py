"""``inspect``: what is shown of models that can be run, and of those that cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import LLM, cli
from reference.gguf_writer import write_gguf
from reference.tiny_chat import write_chat_folder
from reference.tiny_llama import make_config, make_weights, write_gguf_file

KEY_VALUE_BYTES = 2 * 2 * 2 * 16 * 2  # two layers, K and V, two heads, 16 wide, two bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_chat_folder(tmp_path / "tiny", max_position_embeddings=5000)


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    config = make_config()
    return str(write_gguf_file(tmp_path / "a.gguf", config, make_weights(config, 1), "q8_0"))


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert cli.main(["inspect", "--device", "cpu", *arguments]) == status
    return capsys.readouterr()


def report(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    return json.loads(inspect(capsys, "--json", *arguments, status=status).out)


def test_a_model_that_can_be_run(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = report(capsys, str(folder))
    assert found["problems"] == {}
    assert found["architecture"] == "llama"
    assert (found["config"]["num_layers"], found["config"]["hidden_size"]) == (2, 64)
    assert found["tokenizer"] == {"kind": "tokenizer.json", "vocab_size": 258}
    assert found["chat_template"]
    assert set(found["tensors"]) == {"bf16", "f32"}
    memory = found["memory"]
    total = sum(tensors["nbytes"] for tensors in found["tensors"].values())
    assert memory["weights"] == total
    rows = [(row["tokens"], row["one_sequence"]) for row in memory["contexts"]]
    blocks = {2048: 128, 4096: 256, 5000: 313}
    assert rows == [(tokens, n * 16 * KEY_VALUE_BYTES) for tokens, n in blocks.items()]
    assert all(row["all_sequences"] == 64 * row["one_sequence"] for row in memory["contexts"])


def test_the_plan_is_what_an_engine_takes(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    options = ["--max-num-seqs", "3", "--max-model-len", "100", "--dtype", "float32"]
    (row,) = report(capsys, str(folder), *options)["memory"]["contexts"]
    with LLM(
        model=str(folder), device="cpu", dtype="float32", max_num_seqs=3, max_model_len=100
    ) as llm:
        (group,) = llm._engine.runner.kv_groups
        block_size = llm._engine.runner.block_size
    assert row["tokens"] == 100
    assert row["all_sequences"] == group.num_blocks * block_size * KEY_VALUE_BYTES * 2


def test_the_plan_of_a_smaller_cache(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    whole = report(capsys, str(folder))["memory"]
    small = report(capsys, str(folder), "--kv-dtype", "int8")["memory"]
    assert small["kv_dtype"] == "int8"
    pairs = zip(small["contexts"], whole["contexts"], strict=True)
    # A byte a value and a float a head, instead of two bytes a value.
    assert all(0.5 < a["one_sequence"] / b["one_sequence"] < 0.75 for a, b in pairs)


def test_tensors_on_demand(capsys: pytest.CaptureFixture[str], gguf: str) -> None:
    name = "blk.0.attn_q.weight"
    assert name not in inspect(capsys, gguf, status=1).out
    assert f"{name}  q8_0 [64, 64]" in inspect(capsys, gguf, "--tensors", status=1).out
    tensors = report(capsys, gguf, "--tensors", status=1)["tensors"]
    found = {"name": name, "dtype": "q8_0", "shape": [64, 64], "nbytes": 4352}
    assert found in tensors


def test_a_text_for_people(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    lines = inspect(capsys, str(folder)).out.splitlines()
    shown = {line.partition(":")[0]: line.partition(":")[2].strip() for line in lines}
    assert shown["architecture"] == "llama"
    assert shown["tokenizer"] == "tokenizer.json, 258 tokens"
    assert shown["chat template"] == "yes"
    assert lines[-1].split()[0] == "5,000"


def test_a_model_without_its_tokenizer(capsys: pytest.CaptureFixture[str], gguf: str) -> None:
    captured = inspect(capsys, gguf, status=1)
    assert "num layers:           2" in captured.out
    assert "no tokenizer:" in captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("rapshee-engine: this model cannot be run: ")
    assert report(capsys, gguf, status=1)["memory"]["contexts"]


def test_an_architecture_that_is_not_supported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "x.gguf", {"general.architecture": "mamba"}, {})
    found = report(capsys, str(path), status=1)
    assert found["architecture"] == "mamba"
    assert found["tensors"] == {}
    assert "mamba" in found["problems"]["model"]
    assert "config" not in found


def test_a_folder_that_is_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "odd"}))
    found = report(capsys, str(folder), status=1)
    assert "hidden_act" in found["problems"]["model"]
    assert found["tensors"]["f32"]["count"] == 5
    assert found["tokenizer"]["vocab_size"] == 258
    assert "memory" not in found


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 64])
def test_a_file_that_is_broken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    found = report(capsys, str(path), status=1)
    assert set(found) == {"path", "problems"}
    assert str(path) in found["problems"]["model"]


def test_a_template_that_does_not_parse_leaves_a_model(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")
    found = report(capsys, str(folder))
    assert set(found["problems"]) == {"chat_template"}


def test_nothing_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model at /nowhere" in inspect(capsys, "/nowhere", status=1).err
