"""What is fuzzed. Each target takes any bytes, and raises only what is a finding."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from hostile.case import TEMPLATE, Folder, Gguf
from rapshee_engine.errors import RapsheeError, WeightFileError
from rapshee_engine.tokenizer import ChatTemplate, chat_template_from_gguf, tokenizer_from_gguf
from rapshee_engine.weights.gguf import read_gguf
from rapshee_engine.weights.loader import load_checkpoint
from rapshee_engine.weights.safetensors import read_safetensors
from rapshee_engine.weights.tensor_info import TensorInfo
from reference.fake_runner import make_tokenizer

__all__ = ["SEEDS", "fuzz_config", "fuzz_gguf", "fuzz_safetensors", "fuzz_template"]


@contextmanager
def _file(data: bytes) -> Iterator[str]:
    """The path of a file in memory."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _check_places(tensors: Mapping[str, TensorInfo], size: int) -> None:
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        assert end <= tensor.offset, "tensors overlap"
        end = tensor.offset + tensor.nbytes
        assert tensor.nbytes > 0
        assert min(tensor.shape) > 0
    assert end <= size, "a tensor lies outside the file"


def fuzz_gguf(data: bytes) -> None:
    """A GGUF file: its header, the model that it describes, its tokenizer, its chat template."""
    with _file(data) as path:
        try:
            _check_places(read_gguf(path).tensors, len(data))
        except WeightFileError:
            return
        try:
            checkpoint = load_checkpoint(path)
            metadata = checkpoint.gguf_metadata or {}
            tokenizer_from_gguf(metadata, path).encode("The dog")
            ChatTemplate(chat_template_from_gguf(metadata, path) or "")
        except RapsheeError:
            return


def fuzz_safetensors(data: bytes) -> None:
    """The header of a safetensors file."""
    with _file(data) as path:
        try:
            tensors = read_safetensors(path)
        except WeightFileError:
            return
        _check_places(tensors, len(data))


def fuzz_config(data: bytes) -> None:
    """A ``config.json``."""
    folder = _folder()
    (folder / "config.json").write_bytes(data)
    try:
        load_checkpoint(folder, "dummy")
    except RapsheeError:
        return


def fuzz_template(data: bytes) -> None:
    """A chat template of up to 4 KiB: to be compiled, and rendered with one message."""
    source = data[:4096].decode("utf-8", errors="replace")
    try:
        template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
        template.render_ids(_tokenizer(), [{"role": "user", "content": "hi"}])
    except RapsheeError:
        return


_tokenizer = cache(make_tokenizer)


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def _small_gguf() -> bytes:
    gguf = Gguf()
    gguf.set("tokenizer.ggml.merges", ["t h", "th e"])
    return gguf.build()


@cache
def _safetensors() -> bytes:
    folder = Folder()
    header = json.dumps(folder.tensors).encode()
    return len(header).to_bytes(8, "little") + header + folder.data


SEEDS = {
    fuzz_gguf: _small_gguf,
    fuzz_safetensors: _safetensors,
    fuzz_config: lambda: str(Folder().files["config.json"]).encode(),
    fuzz_template: TEMPLATE.encode,
}
"""Target -> a valid input."""
