"""Hugging Face folders: weights, index, and the two configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.case import Case, Folder, Write
from rapshee_engine.errors import ConfigError, RapsheeError, UnsupportedModelError
from reference.safetensors_writer import build_safetensors

__all__ = ["folder_cases"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Change = Callable[[Folder], None]


def writer(change: Change) -> Write:
    def write(path: Path) -> Path:
        folder = Folder()
        change(folder)
        return folder.write(path)

    return write


def folder_case(
    name: str, attack: Change, twin: Change | None = None, file: str = WEIGHTS, **fields: Any
) -> Case:
    """A case of a folder. Without a twin of its own it has the unchanged folder."""
    right = write_folder if twin is None else writer(twin)
    return Case(f"{file or 'folder'}: {name}", writer(attack), right, file, **fields)


def write_folder(path: Path) -> Path:
    return Folder().write(path)


def put(file: str, content: str | bytes) -> Change:
    return lambda folder: folder.files.update({file: content})


def edit(file: str, **changes: Any) -> Change:
    return lambda folder: folder.edit(file, **changes)


# ------------------------------------------------------------------------------------- safetensors


def entry(name: str = NORM, **changes: Any) -> Change:
    """Change a tensor's entry in the header."""
    return lambda folder: folder.tensors[name].update(changes)


def header(text: bytes, length: int | None = None) -> Change:
    """Another header before the same data."""
    return lambda f: f.files.update({WEIGHTS: build_safetensors(text, f.data, length=length)})


def own_header(change: Callable[[bytes], bytes]) -> Change:
    return lambda f: header(change(json.dumps(f.tensors).encode()))(f)


def cut(size: int) -> Change:
    """The file ends after ``size`` bytes, or that many before its end."""
    return lambda f: f.files.update({WEIGHTS: build_safetensors(f.tensors, f.data)[:size]})


def weights() -> Iterator[Case]:
    for label, size in {"no": 0, "7": 7, "8": 8, "9": 9, "100": 100, "all but one": -1}.items():
        yield folder_case(f"{label} bytes", cut(size))
    yield folder_case("a cut in the data", cut(-30_000))
    for label, length in {
        "2^64-1": (1 << 64) - 1,
        "2^63": 1 << 63,
        "2^32": 1 << 32,
        "100 MB": 100_000_000,
        "0": 0,
        "1": 1,
    }.items():
        yield folder_case(f"a header of {label} bytes", header(b"{}", length))
    texts = {
        "a list": b"[]",
        "null": b"null",
        "no JSON": b"{" * 1000,
        "deep lists": b"[" * 10**6,
        "deep objects": b'{"a":' * 10**5,
        "deep closed lists": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        "a number of 10^5 digits": b'{"a":' + b"9" * 10**5 + b"}",
        "infinity": b'{"a": 1e999}',
        "no UTF-8": b'{"\xff": 1}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a surrogate": b'{"\\ud800": 1}',
        "a zero byte": b"{}\0",
        "a key twice": b'{"a": 1, "a": 1}',
        "10^5 empty entries": json.dumps({str(i): {} for i in range(10**5)}).encode(),
        "no tensors": b"{}",
    }
    for label, text in texts.items():
        yield folder_case(f"header: {label}", header(text))
    pad = own_header(lambda text: text + b"   ")
    yield folder_case("header: a mark before it", own_header(lambda t: b"\xef\xbb\xbf" + t), pad)
    twice = own_header(lambda t: t[:-1] + b', "' + NORM.encode() + b'": {}}')
    yield folder_case("header: a tensor twice", twice, pad)
    for label, metadata in {"a list": [], "a number": {"a": 1}, "null": None}.items():
        yield folder_case(
            f"header: metadata {label}", lambda f, m=metadata: f.tensors.update(__metadata__=m)
        )


def tensors() -> Iterator[Case]:
    shapes: list[Any] = [
        [],
        [0],
        [-32],
        [33],
        [31],
        [1, 32],
        [1, 1, 1, 1, 32],
        [1 << 64],
        [(1 << 64) + 32],
        [1 << 62, 1 << 62],
        [10**300],
        [32.0],
        ["32"],
        [True],
        [[32]],
        {"0": 32},
        None,
        "32",
        [1] * 10**5,
    ]
    for shape in shapes:
        yield folder_case(f"shape {shape!r:.40}", entry(shape=shape))
    begin = Folder().tensors[NORM]["data_offsets"][0]
    for offsets in (
        [begin, begin + 129],
        [begin, begin + 127],
        [begin + 128, begin],
        [-128, 0],
        [begin, 1 << 63],
        [1 << 63, (1 << 63) + 128],
        [(1 << 64) - 128, 1 << 64],
        [1 << 70, (1 << 70) + 128],
        [0, 128],
        [begin],
        [begin, begin, begin + 128],
        [float(begin), begin + 128.0],
        [],
        None,
        [10**4000, 10**4000],
    ):
        yield folder_case(f"offsets {offsets!r:.40}", entry(data_offsets=offsets))
    for dtype in ("I64", "F8_E4M3", "f32", "", "F16", None, ["F32"], "F" * 10**5):
        yield folder_case(f"dtype {dtype!r:.20}", entry(dtype=dtype))
    yield folder_case("an entry without a shape", lambda f: f.tensors[NORM].pop("shape"))
    yield folder_case("an entry with more", entry(strides=[1]))
    for value in (None, 5, "F32", []):
        yield folder_case(f"an entry {value!r}", lambda f, v=value: f.tensors.update({NORM: v}))
    yield folder_case("bytes behind the tensors", lambda f: setattr(f, "data", f.data + b"x"))
    yield folder_case("a missing tensor", missing)
    for name in ("", "model.norm.weights", "n" * 10**6, "\0", "../x"):
        yield folder_case(
            f"an unknown tensor {name!r:.20}",
            lambda f, n=name: unknown(f, n),
            error=UnsupportedModelError,
        )


def missing(f: Folder) -> None:
    """The last tensor is not there, nor are its bytes."""
    name = next(reversed(f.tensors))
    f.data = f.data[: f.tensors.pop(name)["data_offsets"][0]]


def unknown(f: Folder, name: str) -> None:
    end = len(f.data)
    f.data += bytes(4)
    f.tensors[name] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}


# ------------------------------------------------------------------------------------------- index


def shard(f: Folder) -> None:
    """Deal the tensors out to two files."""
    entries = {name: e for name, e in f.tensors.items() if name != "__metadata__"}
    weight_map = {}
    for i, file in enumerate(SHARDS):
        own, data = {}, b""
        for name in list(entries)[i::2]:
            begin, end = entries[name]["data_offsets"]
            own[name] = entries[name] | {"data_offsets": [len(data), len(data) + end - begin]}
            data += f.data[begin:end]
            weight_map[name] = file
        f.files[file] = build_safetensors(own, data)
    f.files[INDEX] = json.dumps({"metadata": {"total_size": len(f.data)}, "weight_map": weight_map})


class ShardedFolder(Folder):
    """A folder whose weights lie in two files."""

    def __init__(self) -> None:
        super().__init__()
        shard(self)

    def write(self, folder: Path) -> Path:
        self.files[WEIGHTS] = b""
        super().write(folder)
        (folder / WEIGHTS).unlink()
        return folder


def sharded_case(name: str, attack: Change, file: str = INDEX) -> Case:
    def write(path: Path, change: Change) -> Path:
        folder = ShardedFolder()
        change(folder)
        return folder.write(path)

    return Case(f"index: {name}", lambda path: write(path, attack), write_sharded_folder, file)


def write_sharded_folder(path: Path) -> Path:
    return ShardedFolder().write(path)


def place(name: str, shard_name: Any) -> Change:
    def change(f: Folder) -> None:
        fields = json.loads(f.files[INDEX])
        fields["weight_map"][name] = shard_name
        f.files[INDEX] = json.dumps(fields)

    return change


def index() -> Iterator[Case]:
    for text in ("", "[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 10**5):
        yield sharded_case(f"{text!r:.30}", put(INDEX, text))
    for name in ("../x", "/etc/passwd", "a/b", "", ".", "..", "a\0b", 5, None, ["x"]):
        yield sharded_case(f"file {name!r}", place(NORM, name))
    yield sharded_case("file of 300 letters", place(NORM, "x" * 300), "x" * 300)
    yield sharded_case("itself as a file", place(NORM, INDEX), INDEX)
    yield sharded_case("a file that is not there", place(NORM, "absent"), "absent")
    yield sharded_case("a tensor in the wrong file", place(EMBED, SHARDS[1]), SHARDS[0])
    yield sharded_case("a tensor that no file has", place("x.weight", SHARDS[1]), SHARDS[1])
    many = json.dumps({"weight_map": {f"t{i}": f"missing{i}" for i in range(10**5)}})
    yield sharded_case("10^5 tensors in 10^5 files", put(INDEX, many), "missing0")
    for total in (0, -1, 1 << 63, 1 << 64, 10**400, 1e300, "1", True, [1]):
        yield sharded_case(f"total_size {total!r:.20}", edit(INDEX, metadata={"total_size": total}))
    yield sharded_case("an empty shard", put(SHARDS[0], b""), SHARDS[0])
    yield sharded_case("a shard of zeros", put(SHARDS[0], bytes(1000)), SHARDS[0])


# --------------------------------------------------------------------------------- configurations


def json_attacks(file: str) -> Iterator[Case]:
    """What any JSON file may be."""
    texts: dict[str, str | bytes] = {
        "empty": "",
        "a list": "[]",
        "null": "null",
        "a string": '"x"',
        "unclosed": "{",
        "closed twice": "{}}",
        "deep": '{"a":' * 10**5,
        "deep lists": "[" * 10**6,
        "a key twice": '{"a": 1, "a": 1}',
        "a number of 10^5 digits": '{"a": ' + "1" * 10**5 + "}",
        "not a number": '{"a": NaN}',
        "infinite": '{"a": -Infinity}',
        "an exponent of 999": '{"a": 1e999}',
        "not UTF-8": b'{"a": "\xff"}',
        "a mark before it": b"\xef\xbb\xbf{}",
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a zero byte": b'{"a": 1}\0',
        "a lone surrogate": '{"a": "\\ud800"}',
        "comments": '{"a": 1} // x',
    }
    for label, text in texts.items():
        yield folder_case(label, put(file, text), file=file)


def numbers() -> Iterator[Case]:
    def bad(key: str, value: Any, error: type[RapsheeError] | None = None) -> Case:
        fields = {} if error is None else {"error": error}
        return folder_case(
            f"{key} {value!r:.30}",
            edit("config.json", **{key: value}),
            file="config.json",
            **fields,
        )

    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "head_dim",
    )
    for key in sizes:
        for value in (0, -1, 1.5, "32", True, [], {}, 1 << 31, 1 << 63, 10**400, 1e300):
            yield bad(key, value)
    for key in ("rms_norm_eps", "rope_theta"):
        for value in (0, -1.0, 1e-300, 1e300, "1", True, [], 10**400):
            yield bad(key, value)
    yield bad("num_attention_heads", 3)
    yield bad("head_dim", 15)
    yield bad("tie_word_embeddings", "yes")
    yield bad("attention_bias", 1)
    yield bad("model_type", None)
    yield bad("model_type", 5)
    yield bad("model_type", "gpt9", UnsupportedModelError)
    yield bad("hidden_act", "relu", UnsupportedModelError)
    yield bad("secret_switch", True, UnsupportedModelError)
    yield bad("sliding_window", 4, UnsupportedModelError)
    for value in ([510], [-1], "2", 1.0, True, 1 << 64, {"id": 1}, [[1]] * 10**4):
        yield bad("eos_token_id", value)


def rope() -> Iterator[Case]:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    linear = {"rope_type": "linear", "factor": 2.0}
    wrong: list[tuple[Any, Any]] = [
        (linear | {"factor": 0}, linear),
        (linear | {"factor": -2.0}, linear),
        (linear | {"factor": 1e-320}, linear),
        (linear | {"factor": "2"}, linear),
        ({"rope_type": "linear"}, linear),
        (llama3 | {"low_freq_factor": 4.0}, llama3),
        (llama3 | {"high_freq_factor": 0}, llama3),
        (llama3 | {"original_max_position_embeddings": 0}, llama3),
        (llama3 | {"original_max_position_embeddings": 1 << 40}, llama3),
        ([], linear),
        ("linear", linear),
        ({"rope_type": 5}, linear),
    ]
    for attack, twin in wrong:
        yield folder_case(
            f"rope_scaling {attack!r:.200}",
            edit("config.json", rope_scaling=attack),
            edit("config.json", rope_scaling=twin),
            file="config.json",
        )
    for attack in ({"rope_type": "spiral", "factor": 2.0}, {**linear, "attention_factor": 1e30}):
        yield folder_case(
            f"rope_scaling {attack!r}",
            edit("config.json", rope_scaling=attack),
            file="config.json",
            error=UnsupportedModelError,
        )


def promises() -> Iterator[Case]:
    """Small files that promise a large model."""

    def large(label: str, file: str = WEIGHTS, **changes: Any) -> Case:
        return folder_case(label, edit("config.json", **changes), file=file)

    yield large("a configuration of 2^24 tokens", vocab_size=1 << 24)
    yield large("a configuration of 4096 layers", num_hidden_layers=4096)
    yield large("a configuration of a width of 2^24", hidden_size=1 << 24, head_dim=16)
    yield large("a configuration of heads of 4096", head_dim=4096)

    def dummy(label: str, **changes: Any) -> Case:
        options = (("load_format", "dummy"),)
        fields = {"stage": "engine", "error": ConfigError, "options": options}
        return folder_case(label, edit("config.json", **changes), file="", **fields)

    yield dummy(
        "random weights of 2^48 elements", vocab_size=1 << 24, hidden_size=1 << 24, head_dim=16
    )
    yield dummy("random weights with heads of 4096", head_dim=4096)
    yield dummy(
        "random weights of 4096 wide layers", num_hidden_layers=4096, intermediate_size=1 << 24
    )


def generation() -> Iterator[Case]:
    file = "generation_config.json"
    for value in (510, -1, "2", 1.5, True, 1 << 64, [2, 510], {"id": 1}):
        yield folder_case(
            f"eos_token_id {value!r}",
            edit(file, eos_token_id=value),
            edit(file, eos_token_id=2),
            file=file,
        )


def folder_cases() -> list[Case]:
    parts = (weights, tensors, index, numbers, rope, promises, generation)
    cases = [case for part in parts for case in part()]
    for file in ("config.json", "generation_config.json"):
        cases += json_attacks(file)
    return cases
