"""What a case is, and the valid checkpoints that cases are made from."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rapshee_engine.errors import RapsheeError, WeightFileError
from reference.gguf_writer import TYPE_IDS, TensorRecord, string, typed_value
from reference.quant import encode
from reference.safetensors_writer import build_safetensors
from reference.tiny_llama import make_config, make_weights

__all__ = ["CONFIG", "Case", "Folder", "Gguf", "Write", "gguf_case", "tokenizer_rules"]

TOKENIZER = Path(__file__).parent.parent / "golden" / "chat_tokenizers" / "byte_level"
CONFIG = make_config(
    vocab_size=510,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

Write = Callable[[Path], Path]
"""Writes a checkpoint into an empty folder; the path to load."""


@dataclass(frozen=True)
class Case:
    """One attack.

    Attributes:
        name: of the case.
        attack, twin: write the hostile checkpoint, and the valid one.
        file: name of the file that the error must name.
        stage: what refuses it first: ``checkpoint``, ``tokenizer``, ``engine``, or ``chat``, which
            a model with a broken template refuses while it still completes text.
        error: type of the error.
        options: of `LLM`.
    """

    name: str
    attack: Write
    twin: Write
    file: str
    stage: str = "checkpoint"
    error: type[RapsheeError] = WeightFileError
    options: tuple[tuple[str, Any], ...] = ()


@cache
def tokenizer_rules() -> str:
    """A small byte-level ``tokenizer.json``."""
    return (TOKENIZER / "tokenizer.json").read_text()


@cache
def _weights() -> dict[str, Any]:
    return make_weights(CONFIG, seed=0)


def _gguf_tokenizer() -> dict[str, Any]:
    """The same vocabulary as a conversion to GGUF writes it."""
    rules = json.loads(tokenizer_rules())
    ids = dict(rules["model"]["vocab"])
    types = dict.fromkeys(ids, 1)
    for token in rules["added_tokens"]:
        ids[token["content"]] = token["id"]
        types[token["content"]] = 3 if token["special"] else 4
    tokens = sorted(ids, key=ids.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types[token] for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in rules["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": ids["<|im_start|>"],
        "tokenizer.ggml.eos_token_id": ids["<|endoftext|>"],
        "tokenizer.chat_template": TEMPLATE,
    }


_GGUF_TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


class Gguf:
    """The parts of a valid GGUF file, to be changed and put together.

    Attributes:
        keys: (key, type and value), as bytes, in order.
        records: the tensor table.
        data: the data section.
        num_keys, num_tensors: what the header says; None: the truth.
    """

    def __init__(self) -> None:
        self.keys: list[tuple[bytes, bytes]] = []
        self.records: list[TensorRecord] = []
        self.data = b""
        self.magic, self.version = b"GGUF", 3
        self.num_keys: int | None = None
        self.num_tensors: int | None = None
        self.alignment = 32
        metadata = {
            "general.architecture": "llama",
            "llama.block_count": 1,
            "llama.context_length": 256,
            "llama.embedding_length": 32,
            "llama.feed_forward_length": 32,
            "llama.attention.head_count": 2,
            "llama.attention.head_count_kv": 1,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": 16,
            "llama.rope.freq_base": 10000.0,
            "llama.vocab_size": 510,
            **_gguf_tokenizer(),
        }
        for key, value in metadata.items():
            self.set(key, value)
        for name, own in _GGUF_TENSORS.items():
            self.add(own, _weights()[name])

    def set(self, key: str, value: Any) -> None:
        """Set a metadata key; None removes it."""
        self.set_raw(key, None if value is None else typed_value(value))

    def set_raw(self, key: str, value: bytes | None) -> None:
        """Set a metadata key to bytes of type and value."""
        name = key.encode()
        place = next((i for i, (k, _) in enumerate(self.keys) if k == name), len(self.keys))
        self.keys[place : place + 1] = [] if value is None else [(name, value)]

    def number(self, key: str, kind: int, layout: str, value: float) -> None:
        """Set a metadata key to a number of a GGUF type."""
        self.set_raw(key, struct.pack("<I", kind) + struct.pack(layout, value))

    def add(self, name: str, array: Any, dtype: str = "f32") -> None:
        """Add a tensor."""
        self.data += bytes(-len(self.data) % self.alignment)
        dims = tuple(reversed(array.shape))
        self.records.append(TensorRecord(name, dims, TYPE_IDS[dtype], len(self.data)))
        self.data += encode(array, dtype)

    def change(self, index: int, **changes: Any) -> None:
        """Replace fields of a tensor's record."""
        self.records[index] = TensorRecord(**{**vars(self.records[index]), **changes})

    def pieces(self) -> list[tuple[str, bytes]]:
        """(name, bytes) of every structural part, in order."""
        num_tensors = len(self.records) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        parts = [
            ("magic", self.magic),
            ("version", struct.pack("<I", self.version)),
            ("number of tensors", struct.pack("<Q", num_tensors)),
            ("number of keys", struct.pack("<Q", num_keys)),
        ]
        for key, value in self.keys:
            name = key.decode(errors="replace")
            parts += [
                (f"length of {name}", struct.pack("<Q", len(key))),
                (f"key {name}", key),
                (f"type of {name}", value[:4]),
                (f"value of {name}", value[4:]),
            ]
        for record in self.records:
            parts += [
                (f"name of {record.name[:40]}", string(record.name)),
                (f"record of {record.name[:40]}", record.to_bytes()[len(string(record.name)) :]),
            ]
        size = sum(len(data) for _, data in parts)
        return [*parts, ("padding", bytes(-size % self.alignment)), ("data", self.data)]

    def build(self) -> bytes:
        return b"".join(data for _, data in self.pieces())


def gguf_case(
    name: str,
    attack: Callable[[Gguf], bytes | None],
    twin: Callable[[Gguf], bytes | None] | None = None,
    **fields: Any,
) -> Case:
    """A case of a GGUF file. The functions change the parts, or give the whole file's bytes;
    without a twin of its own it has the unchanged file."""

    def writer(change: Callable[[Gguf], bytes | None]) -> Write:
        def write(folder: Path) -> Path:
            parts = Gguf()
            data = change(parts)
            path = folder / "model.gguf"
            path.write_bytes(parts.build() if data is None else data)
            return path

        return write

    right = write_gguf if twin is None else writer(twin)
    return Case(f"gguf: {name}", writer(attack), right, "model.gguf", **fields)


def write_gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(Gguf().build())
    return folder / "model.gguf"


class Folder:
    """A valid Hugging Face folder, to be changed before it is written.

    Attributes:
        files: name -> content.
        tensors: header of ``model.safetensors``.
        data: its data section.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.data = b""
        for name, array in _weights().items():
            begin = len(self.data)
            self.data += encode(array, "f32")
            self.tensors[name] = {
                "dtype": "F32",
                "shape": list(array.shape),
                "data_offsets": [begin, len(self.data)],
            }
        self.files: dict[str, str | bytes] = {
            "config.json": json.dumps(CONFIG),
            "tokenizer.json": tokenizer_rules(),
            "tokenizer_config.json": json.dumps(
                {
                    "bos_token": "<|im_start|>",
                    "eos_token": "<|im_end|>",
                    "chat_template": TEMPLATE,
                }
            ),
        }

    def edit(self, file: str, **changes: Any) -> None:
        """Change keys of a JSON file."""
        fields = json.loads(self.files.get(file, "{}"))
        self.files[file] = json.dumps({**fields, **changes})

    def write(self, folder: Path) -> Path:
        if "model.safetensors" not in self.files:
            self.files["model.safetensors"] = build_safetensors(self.tensors, self.data)
        for name, content in self.files.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(data)
        return folder
