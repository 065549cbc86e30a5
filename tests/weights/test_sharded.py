"""Checkpoints in shards: the same model as in one file, and every disagreement by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rapshee_engine.errors import ConfigError, WeightFileError
from rapshee_engine.llm import LLM
from rapshee_engine.sampling_params import SamplingParams
from rapshee_engine.weights.loader import load_checkpoint
from reference.quant import decode
from reference.safetensors_writer import write_safetensors
from reference.tiny_llama import make_config, make_weights, write_hf_folder, write_sharded_folder

TOKENIZER = Path(__file__).parent.parent / "golden" / "chat_tokenizers" / "byte_level"
CONFIG = make_config(vocab_size=510, tie_word_embeddings=False)
WEIGHTS = make_weights(CONFIG, seed=0)
INDEX = "model.safetensors.index.json"
NAMES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sharded_folder(tmp_path / "sharded", CONFIG, WEIGHTS, shards=3)


def change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | changes))


def weight_map(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def rewrite(folder: Path, shard: str, *, drop: str = "", add: str = "") -> None:
    """Write a shard again, without one of its tensors or with one more."""
    names = [name for name, file in weight_map(folder).items() if file == shard and name != drop]
    tensors = {name: WEIGHTS[name] for name in (*names, add) if name}
    write_safetensors(folder / shard, {name: ("f32", w) for name, w in tensors.items()})


def test_shards_are_found_and_read(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.path, checkpoint.format) == (str(folder), "safetensors")
    assert {entry.file for entry in checkpoint.entries} == {str(folder / name) for name in NAMES}
    entry = next(e for e in checkpoint.entries if e.name == "layers.1.down.weight")
    with open(entry.file, "rb") as stream:
        stream.seek(entry.offset)
        values = decode(stream.read(entry.nbytes), entry.dtype, entry.shape)
    np.testing.assert_array_equal(values, WEIGHTS["model.layers.1.mlp.down_proj.weight"])


def test_three_shards_answer_like_one_file(folder: Path, tmp_path: Path) -> None:
    whole = write_hf_folder(tmp_path / "whole", CONFIG, WEIGHTS)
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=5, logprobs=4)
    answers = []
    for path in (whole, folder):
        shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)
        with LLM(str(path), device="cpu", threads=2) as llm:
            (output,) = llm.generate("The dog", params, use_tqdm=False)
            completion = output.outputs[0]
            answers.append(
                (llm._engine.fingerprint, completion.token_ids, repr(completion.logprobs))
            )
    assert answers[0] == answers[1]


def test_a_single_file_is_taken_first(folder: Path) -> None:
    write_hf_folder(folder, CONFIG, WEIGHTS)
    assert {e.file for e in load_checkpoint(folder).entries} == {str(folder / "model.safetensors")}


def test_links_as_in_the_cache_of_hugging_face(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        os.rename(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert {Path(e.file).parent for e in load_checkpoint(snapshot).entries} == {snapshot}


def test_a_folder_with_neither(folder: Path) -> None:
    os.remove(folder / INDEX)
    with pytest.raises(ConfigError, match=r"no model\.safetensors or model\.safetensors\.index"):
        load_checkpoint(folder)


def test_a_missing_shard(folder: Path) -> None:
    os.remove(folder / NAMES[1])
    with pytest.raises(WeightFileError, match="cannot be read: No such file") as caught:
        load_checkpoint(folder)
    assert caught.value.file == str(folder / NAMES[1])


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "sub/x", "/etc/passwd", "./x", "a\0b", 3, None, [NAMES[0]], {}],
    ids=repr,
)
def test_names_stay_in_the_folder(folder: Path, name: Any) -> None:
    change_index(folder, weight_map=weight_map(folder) | {"model.norm.weight": name})
    with pytest.raises(WeightFileError, match="name of a file in this folder") as caught:
        load_checkpoint(folder)
    assert (caught.value.file, caught.value.tensor) == (str(folder / INDEX), "model.norm.weight")


@pytest.mark.parametrize("value", [None, {}, [], "x", 5])
def test_the_map_must_be_one(folder: Path, value: Any) -> None:
    change_index(folder, weight_map=value)
    with pytest.raises(WeightFileError, match="weight_map must map tensors to files"):
        load_checkpoint(folder)


def test_a_tensor_in_another_shard_than_listed(folder: Path) -> None:
    change_index(folder, weight_map=weight_map(folder) | {"model.norm.weight": NAMES[0]})
    with pytest.raises(WeightFileError, match=f"should lie in {NAMES[0]} by") as caught:
        load_checkpoint(folder)
    assert caught.value.file == str(folder / weight_map(folder)["lm_head.weight"])
    assert caught.value.tensor == "model.norm.weight"


def test_a_tensor_that_its_shard_has_not(folder: Path) -> None:
    rewrite(folder, NAMES[2], drop="model.norm.weight")
    with pytest.raises(WeightFileError, match=r"is missing, but .*index\.json lists it") as caught:
        load_checkpoint(folder)
    assert (caught.value.file, caught.value.tensor) == (
        str(folder / NAMES[2]),
        "model.norm.weight",
    )


def test_a_tensor_that_the_index_has_not(folder: Path) -> None:
    names = weight_map(folder)
    del names["model.norm.weight"]
    change_index(folder, weight_map=names)
    with pytest.raises(WeightFileError, match=r"is not listed in .*index\.json") as caught:
        load_checkpoint(folder)
    assert caught.value.tensor == "model.norm.weight"


@pytest.mark.parametrize(
    ("tensor", "other", "reason"),
    [
        ("model.embed_tokens.weight", NAMES[2], f"lies in .*{NAMES[0]} too"),
        ("model.norm.weight", NAMES[0], f"should lie in {NAMES[2]} by"),
    ],
)
def test_a_tensor_in_two_shards(folder: Path, tensor: str, other: str, reason: str) -> None:
    rewrite(folder, other, add=tensor)
    with pytest.raises(WeightFileError, match=reason) as caught:
        load_checkpoint(folder)
    assert (caught.value.file, caught.value.tensor) == (str(folder / other), tensor)


@pytest.mark.parametrize("offset", [-1, 1, 1 << 70])
def test_a_wrong_total(folder: Path, offset: int) -> None:
    total = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
    change_index(folder, metadata={"total_size": total + offset})
    with pytest.raises(WeightFileError, match=r"metadata\.total_size is .* bytes") as caught:
        load_checkpoint(folder)
    assert caught.value.file == str(folder / INDEX)
    for right in ({"total_size": float(total), "total_parameters": 1}, {}, None):
        change_index(folder, metadata=right)
        assert load_checkpoint(folder).entries


@pytest.mark.parametrize("metadata", [[], "x", {"total_size": "1"}, {"total_size": True}])
def test_metadata_of_the_wrong_type(folder: Path, metadata: Any) -> None:
    change_index(folder, metadata=metadata)
    with pytest.raises(WeightFileError, match="metadata"):
        load_checkpoint(folder)


def test_a_tensor_that_the_model_lacks_names_the_index(folder: Path) -> None:
    names = weight_map(folder)
    rewrite(folder, NAMES[2], drop="model.norm.weight")
    del names["model.norm.weight"]
    change_index(folder, weight_map=names, metadata=None)
    with pytest.raises(WeightFileError, match="is missing") as caught:
        load_checkpoint(folder)
    assert (caught.value.file, caught.value.tensor) == (str(folder / INDEX), "model.norm.weight")


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_a_shard_that_is_no_file(folder: Path, kind: str) -> None:
    shard = folder / NAMES[0]
    os.remove(shard)
    if kind == "folder":
        shard.mkdir()
    elif kind == "pipe":
        os.mkfifo(shard)
    else:
        shard.symlink_to(shard)
    with pytest.raises(WeightFileError, match="cannot be read") as caught:
        load_checkpoint(folder)
    assert caught.value.file == str(shard)
