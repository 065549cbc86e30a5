from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rapshee_engine.errors import ConfigError, UnsupportedModelError, WeightFileError
from rapshee_engine.weights.gguf import GGUFFile, read_gguf
from rapshee_engine.weights.loader import Checkpoint, load_checkpoint
from reference.gguf_writer import write_gguf
from reference.quant import decode
from reference.tiny_families import family_config, family_weights, write_family_gguf
from reference.tiny_llama import (
    make_config,
    make_weights,
    stored_weights,
    write_gguf_file,
    write_hf_folder,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_folder(tmp_path: Path, dtype: str = "f32", **changes: Any) -> Path:
    config = make_config(**changes)
    return write_hf_folder(tmp_path / "model", config, make_weights(config, seed=0), dtype)


def gguf_file(
    tmp_path: Path, dtype: str = "f32", metadata: dict[str, Any] | None = None, **changes: Any
) -> Path:
    config = make_config(**changes)
    weights = make_weights(config, seed=0)
    return write_gguf_file(tmp_path / "model.gguf", config, weights, dtype, metadata)


def read_entry(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    entry = next(entry for entry in checkpoint.entries if entry.name == name)
    with open(entry.file, "rb") as stream:
        stream.seek(entry.offset)
        return decode(stream.read(entry.nbytes), entry.dtype, entry.shape)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_folder(tmp_path: Path, dtype: str) -> None:
    folder = hf_folder(tmp_path, dtype)
    checkpoint = load_checkpoint(str(folder))
    assert (checkpoint.path, checkpoint.format) == (str(folder), "safetensors")
    assert checkpoint.eos_token_ids == (2,)
    assert checkpoint.gguf_metadata is None
    assert checkpoint.weight_bytes == sum(entry.nbytes for entry in checkpoint.entries) > 0
    weights = stored_weights(make_weights(make_config(), seed=0), dtype)
    expected = weights["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(read_entry(checkpoint, "layers.1.down.weight"), expected)
    np.testing.assert_array_equal(
        read_entry(checkpoint, "final_norm.weight"), weights["model.norm.weight"]
    )


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q4_0", "q4_1", "q8_0"])
def test_gguf(tmp_path: Path, dtype: str) -> None:
    path = gguf_file(tmp_path, dtype)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.path, checkpoint.format) == (str(path), "gguf")
    assert checkpoint.eos_token_ids == (2,)
    assert checkpoint.gguf_metadata is not None
    assert checkpoint.gguf_metadata["general.architecture"] == "llama"
    assert {entry.dtype for entry in checkpoint.entries} == {dtype, "f32"}
    weights = stored_weights(make_weights(make_config(), seed=0), dtype)
    expected = weights["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(read_entry(checkpoint, "layers.1.down.weight"), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"head_dim": 32},
        {"model_type": "mistral", "sliding_window": 7},
    ],
    ids=str,
)
def test_both_formats_give_one_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = load_checkpoint(hf_folder(tmp_path, **changes))
    gguf = load_checkpoint(gguf_file(tmp_path, **changes))
    assert [(e.name, e.shape) for e in folder.entries] == [(e.name, e.shape) for e in gguf.entries]
    assert folder.config.ropes == gguf.config.ropes
    assert folder.config.layers == gguf.config.layers
    for switch in ("tie_embeddings", "qkv_bias", "out_bias", "mlp_bias", "query_scale"):
        assert getattr(folder.config, switch) == getattr(gguf.config, switch)
    assert (folder.config.interleaved_qk, gguf.config.interleaved_qk) == (False, True)


def test_rope_factors_of_a_gguf_are_used(tmp_path: Path) -> None:
    folder = load_checkpoint(hf_folder(tmp_path, rope_scaling=LLAMA3))
    gguf = load_checkpoint(gguf_file(tmp_path, rope_scaling=LLAMA3))
    np.testing.assert_allclose(
        gguf.config.ropes[0].inv_freq, folder.config.ropes[0].inv_freq, rtol=5e-7
    )
    assert "rope_freqs.weight" not in {entry.name for entry in gguf.entries}


def test_dummy_needs_the_configuration_only(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    real = load_checkpoint(folder)
    os.remove(folder / "model.safetensors")
    dummy = load_checkpoint(folder, "dummy")
    assert (dummy.format, dummy.config) == ("dummy", real.config)
    assert [(e.name, e.shape) for e in dummy.entries] == [(e.name, e.shape) for e in real.entries]
    assert {(e.dtype, e.file, e.offset) for e in dummy.entries} == {("bf16", "", 0)}
    assert dummy.weight_bytes * 2 == real.weight_bytes


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [5, 3, 5]}, (5, 3)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": None}, (2,)),
        ({"temperature": 0.6}, (2,)),
    ],
)
def test_generation_config_decides_the_end(
    tmp_path: Path, generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    folder = hf_folder(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load_checkpoint(folder).eos_token_ids == expected


def test_no_end_token(tmp_path: Path) -> None:
    assert load_checkpoint(hf_folder(tmp_path, eos_token_id=None)).eos_token_ids == ()


def test_gguf_end_of_turn_ends_too(tmp_path: Path) -> None:
    path = gguf_file(tmp_path, metadata={"tokenizer.ggml.eot_token_id": 9})
    assert load_checkpoint(path).eos_token_ids == (2, 9)
    path = gguf_file(tmp_path, metadata={"tokenizer.ggml.eot_token_id": 2})
    assert load_checkpoint(path).eos_token_ids == (2,)


@pytest.mark.parametrize("eos", [160, -1, 2.0, "2", True, [2, 160], {"id": 2}])
def test_end_tokens_are_checked(tmp_path: Path, eos: Any) -> None:
    with pytest.raises(WeightFileError, match="eos_token_id must be token ids below 160"):
        load_checkpoint(hf_folder(tmp_path, eos_token_id=eos))


@pytest.mark.parametrize("eos", [160, 2.0, "2", True])
def test_gguf_end_tokens_are_checked(tmp_path: Path, eos: Any) -> None:
    path = gguf_file(tmp_path, metadata={"tokenizer.ggml.eos_token_id": eos})
    with pytest.raises(WeightFileError, match="eos_token_id must be token ids below 160"):
        load_checkpoint(path)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"a GGUF file or a folder with config\.json"):
        load_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="is not a file, as GGUF needs"):
        load_checkpoint(tmp_path, "gguf")
    with pytest.raises(ConfigError, match=r"must be a folder with config\.json"):
        load_checkpoint(gguf_file(tmp_path), "safetensors")
    with pytest.raises(ConfigError, match="load_format must be one of auto, gguf"):
        load_checkpoint(tmp_path, "pickle")


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ConfigError, match="is not a file"):
        load_checkpoint(tmp_path / "pipe.gguf")


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(WeightFileError, match="not a GGUF file"):
        load_checkpoint(path)


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    os.remove(folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        load_checkpoint(folder)


def test_split_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="split into several files"):
        load_checkpoint(gguf_file(tmp_path, metadata={"split.count": 2}))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":' * 100_000, '{"hidden_size": NaN}'])
def test_broken_json_names_the_file(tmp_path: Path, text: str) -> None:
    folder = hf_folder(tmp_path)
    for name in ("generation_config.json", "config.json"):
        (folder / name).write_text(text)
        with pytest.raises(WeightFileError) as caught:
            load_checkpoint(folder)
        assert caught.value.file == str(folder / name)


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_truncated_weights_name_file_and_tensor(tmp_path: Path, form: str) -> None:
    path = gguf_file(tmp_path) if form == "gguf" else hf_folder(tmp_path)
    file = path if form == "gguf" else path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(WeightFileError) as caught:
        load_checkpoint(path)
    assert caught.value.file == str(file)
    assert caught.value.tensor in ("output_norm.weight", "model.norm.weight")


def test_shapes_must_fit_the_configuration(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps(make_config(intermediate_size=128)))
    with pytest.raises(WeightFileError, match=r"must have shape \[128, 64\], got \[96, 64\]") as c:
        load_checkpoint(folder)
    assert c.value.tensor == "model.layers.0.mlp.gate_proj.weight"
    path = gguf_file(tmp_path, metadata={"llama.feed_forward_length": 128})
    with pytest.raises(WeightFileError, match=r"must have shape \[128, 64\], got \[96, 64\]") as c:
        load_checkpoint(path)
    assert c.value.tensor == "blk.0.ffn_gate.weight"


def test_a_file_that_shrinks_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_file(tmp_path, rope_scaling=LLAMA3)

    def read_then_truncate(file: Path) -> GGUFFile:
        header = read_gguf(file)
        os.truncate(file, header.tensors["rope_freqs.weight"].offset + 1)
        return header

    monkeypatch.setattr("rapshee_engine.weights.loader.read_gguf", read_then_truncate)
    with pytest.raises(WeightFileError, match="is truncated") as caught:
        load_checkpoint(path)
    assert caught.value.tensor == "rope_freqs.weight"


@pytest.mark.parametrize(("dtype", "shape"), [("f16", (8,)), ("f32", (2, 4)), ("f32", (4096,))])
def test_rope_factors_are_checked(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    tensors = {"rope_freqs.weight": (dtype, np.ones(shape, dtype=np.float32))}
    path = write_gguf(tmp_path / "model.gguf", {"general.architecture": "llama"}, tensors)
    with pytest.raises(WeightFileError, match="must be f32 with one dimension") as caught:
        load_checkpoint(path)
    assert caught.value.tensor == "rope_freqs.weight"


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q4_0", "q8_0"])
def test_tensors_of_several_matrices_are_shared_out(tmp_path: Path, dtype: str) -> None:
    config = family_config("phi3", num_key_value_heads=1)
    weights = family_weights(config, seed=0)
    path = write_family_gguf(tmp_path / "model.gguf", config, weights, dtype)
    checkpoint = load_checkpoint(path)
    stored = stored_weights(weights, dtype)
    qkv = stored["model.layers.1.self_attn.qkv_proj.weight"]
    gate_up = stored["model.layers.1.mlp.gate_up_proj.weight"]
    for name, expected in (
        ("q", qkv[:64]), ("k", qkv[64:80]), ("v", qkv[80:]),
        ("gate", gate_up[:96]), ("up", gate_up[96:]),
    ):  # fmt: skip
        np.testing.assert_array_equal(read_entry(checkpoint, f"layers.1.{name}.weight"), expected)
    assert checkpoint.weight_bytes == sum(
        tensor.nbytes for tensor in read_gguf(path).tensors.values()
    )


def test_the_context_reaches_the_configuration(tmp_path: Path) -> None:
    longrope = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
    config = family_config("phi3", original_max_position_embeddings=64, rope_scaling=longrope)
    weights = family_weights(config, seed=0)
    for path in (
        write_hf_folder(tmp_path / "model", config, weights),
        write_family_gguf(tmp_path / "model.gguf", config, weights),
    ):
        short, long = (load_checkpoint(path, context_length=n).config.ropes for n in (64, 65))
        np.testing.assert_allclose(np.divide(short[0].inv_freq, long[0].inv_freq), 2.0)
        assert load_checkpoint(path).config.ropes == long
    folder = load_checkpoint(tmp_path / "model", "dummy", context_length=64)
    assert folder.config.ropes[0].inv_freq == short[0].inv_freq
