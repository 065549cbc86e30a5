"""Quantising checkpoints as they are loaded, and the files that this leaves."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pytest

from rapshee_engine import _core
from rapshee_engine.errors import ConfigError, WeightFileError
from rapshee_engine.weights.gguf import read_gguf
from rapshee_engine.weights.loader import Checkpoint, load_checkpoint
from rapshee_engine.weights.quantize import QuantizationPlan, plan_quantization
from rapshee_engine.weights.quantized_cache import quantized
from reference.quant import decode, encode, round_trip
from reference.tiny_llama import make_config, make_weights, write_gguf_file, write_hf_folder

CONFIG = make_config(tie_word_embeddings=False)
WEIGHTS = make_weights(CONFIG, seed=4)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return load_checkpoint(write_hf_folder(tmp_path / "model", CONFIG, WEIGHTS, dtype="bf16"))


def read(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    (entry,) = (entry for entry in checkpoint.entries if entry.name == name)
    data = Path(entry.file).read_bytes()[entry.offset : entry.offset + entry.nbytes]
    return decode(data, entry.dtype, entry.shape)


def only_file(cache: Path) -> Path:
    (path,) = (cache / "quantized").iterdir()
    return path


@pytest.mark.parametrize(("mode", "layers", "most"), [("q8", "q8_0", 0.006), ("q4", "q4_1", 0.11)])
def test_matrices_become_blocks(
    checkpoint: Checkpoint, tmp_path: Path, mode: str, layers: str, most: float
) -> None:
    with quantized(checkpoint, mode, tmp_path / "cache", 2) as low_bit:
        dtypes = {entry.name: entry.dtype for entry in low_bit.entries}
        assert dtypes["embed.weight"] == dtypes["head.weight"] == "q8_0"
        assert dtypes["layers.0.q.weight"] == dtypes["layers.1.down.weight"] == layers
        assert dtypes["final_norm.weight"] == "bf16" or dtypes["final_norm.weight"] == "f32"
        assert [e.name for e in low_bit.entries] == [e.name for e in checkpoint.entries]
        original = read(checkpoint, "layers.1.down.weight")
        error = np.abs(read(low_bit, "layers.1.down.weight") - original) / np.abs(original).max()
        assert 0 < error.max() < most


def test_q4_is_better_than_by_range(checkpoint: Checkpoint, tmp_path: Path) -> None:
    original = read(checkpoint, "layers.1.down.weight")
    with quantized(checkpoint, "q4", tmp_path, 1) as low_bit:
        searched = read(low_bit, "layers.1.down.weight") - original
    by_range = round_trip(original, "q4_1") - original
    assert (searched**2).mean() < (by_range**2).mean()


def test_bytes_do_not_depend_on_threads() -> None:
    data = np.frombuffer(encode(WEIGHTS[DOWN], "f32"), np.uint8)
    one, two = (_core.quantize_rows(data, "f32", 96, to="q4_1", threads=n) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_the_file_is_made_once_and_read_by_any_reader(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quantized(checkpoint, "q4", tmp_path, 1) as first:
        path = only_file(tmp_path)
    matrices = {e.name: e for e in first.entries if e.file == str(path)}
    tensors = read_gguf(path).tensors
    assert {n: (t.dtype, t.shape, t.offset, t.nbytes) for n, t in tensors.items()} == {
        n: (e.dtype, e.shape, e.offset, e.nbytes) for n, e in matrices.items()
    }
    monkeypatch.setattr(QuantizationPlan, "write", None)
    with quantized(checkpoint, "q4", tmp_path, 1) as second:
        assert second == first


@pytest.mark.parametrize("where", [0, 40, 3000, -1])
def test_damage_is_found_and_mended(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: int
) -> None:
    with quantized(checkpoint, "q8", tmp_path, 1):
        pass
    path = only_file(tmp_path)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[where] ^= 1
    for data in (bytes(damaged), whole[: where or 1], whole + b"\0", b""):
        path.write_bytes(data)
        with quantized(checkpoint, "q8", tmp_path, 1):
            assert only_file(tmp_path).read_bytes() == whole
    assert caplog.text.count("is damaged: it is made anew") == 4


def test_another_checkpoint_gets_another_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with quantized(checkpoint, "q8", tmp_path, 1), quantized(checkpoint, "q4", tmp_path, 1):
        assert len(list((tmp_path / "quantized").iterdir())) == 2
    # The same sizes, and the times of the file that was there before.
    weights = Path(checkpoint.path) / "model.safetensors"
    before = weights.stat()
    copy = tmp_path / "other"
    write_hf_folder(copy, CONFIG, make_weights(CONFIG, seed=5), dtype="bf16")
    shutil.copyfile(copy / "model.safetensors", weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    with quantized(checkpoint, "q8", tmp_path, 1) as low_bit:
        np.testing.assert_allclose(
            read(low_bit, "layers.1.down.weight"), make_weights(CONFIG, seed=5)[DOWN], atol=0.01
        )


def test_writers_at_the_same_time_leave_one_whole_file(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    both = threading.Barrier(2)
    results: list[bytes] = []

    def run() -> None:
        both.wait()
        with quantized(checkpoint, "q4", tmp_path, 1) as low_bit:
            results.append(read(low_bit, "layers.0.up.weight").tobytes())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    only_file(tmp_path)


def full_disk(self: QuantizationPlan, stream: BinaryIO, threads: int | None) -> None:
    if "quantize-" in str(getattr(stream, "name", "")) or not _is_memory(stream):
        stream.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")
    write(self, stream, threads)


write = QuantizationPlan.write


def _is_memory(stream: BinaryIO) -> bool:
    return "memfd:" in os.readlink(f"/proc/self/fd/{stream.fileno()}")


def test_a_full_disk_costs_a_warning(
    checkpoint: Checkpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with quantized(checkpoint, "q4", tmp_path / "good", 1) as kept:
        expected = read(kept, "layers.1.down.weight")
    monkeypatch.setattr(QuantizationPlan, "write", full_disk)
    with quantized(checkpoint, "q4", tmp_path / "full", 1) as low_bit:
        np.testing.assert_array_equal(read(low_bit, "layers.1.down.weight"), expected)
        descriptor = Path(low_bit.entries[0].file)
    assert not descriptor.exists() or "memfd" not in os.readlink(descriptor)
    assert list((tmp_path / "full" / "quantized").iterdir()) == []
    assert caplog.text.count("cannot keep quantised weights") == 1
    assert "No space left on device" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING), quantized(checkpoint, "q8", tmp_path / "file", 1) as low:
        read(low, "embed.weight")
    assert caplog.text.count("cannot keep quantised weights") == 1


@pytest.mark.parametrize("dtype", ["q8_0", "q4_1"])
def test_what_is_quantised_already_is_refused(tmp_path: Path, dtype: str) -> None:
    path = write_gguf_file(tmp_path / "model.gguf", CONFIG, WEIGHTS, dtype=dtype)
    with pytest.raises(ConfigError, match=rf"embed\.weight of .*model\.gguf is {dtype} already"):
        plan_quantization(load_checkpoint(path), "q4")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    config = make_config(hidden_size=48, intermediate_size=64)
    folder = write_hf_folder(tmp_path, config, make_weights(config, seed=1))
    with pytest.raises(ConfigError, match=r"cannot quantise embed\.weight: .*multiple of 32"):
        plan_quantization(load_checkpoint(folder), "q8")


def test_random_weights_are_refused(tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, CONFIG, WEIGHTS)
    with pytest.raises(ConfigError, match="needs weights, not load_format dummy"):
        plan_quantization(load_checkpoint(folder, "dummy"), "q8")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_what_has_no_low_bit_form_is_refused(tmp_path: Path, value: float) -> None:
    weights: dict[str, Any] = {name: w.copy() for name, w in WEIGHTS.items()}
    weights[DOWN][3, 5] = value
    folder = write_hf_folder(tmp_path / "model", CONFIG, weights)
    with (
        pytest.raises(WeightFileError, match=r"tensor 'layers\.1\.down\.weight'"),
        quantized(load_checkpoint(folder), "q8", tmp_path / "cache", 1),
    ):
        pass
    assert list((tmp_path / "cache" / "quantized").iterdir()) == []
