"""What lies where a file is expected: folders, pipes, devices, links, holes."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from hostile.case import Case, Folder, Gguf
from rapshee_engine.errors import ConfigError, RapsheeError, WeightFileError

__all__ = ["kind_cases"]

_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_HOLE = 1 << 36  # bytes of a sparse file


def make_kind(path: Path, kind: str) -> None:
    """Put something that is no file at ``path``."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is at most 108 bytes long
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to(kind)


def make_hole(path: Path, begin: bytes = b"") -> None:
    with open(path, "wb") as stream:
        stream.write(begin)
        stream.truncate(_HOLE)


def valid_gguf(path: Path) -> None:
    path.write_bytes(Gguf().build())


def linked(folder: Path) -> Path:
    valid_gguf(folder / "blob")
    (folder / "model.gguf").symlink_to("blob")
    return folder / "model.gguf"


def gguf_kinds() -> Iterator[Case]:
    errors: dict[str, type[RapsheeError]] = dict.fromkeys(
        ("folder", "pipe", "socket", "/dev/zero", "/dev/null", "absent"), ConfigError
    )
    errors["loop"] = WeightFileError
    for kind, error in errors.items():

        def write(folder: Path, kind: str = kind) -> Path:
            make_kind(folder / "model.gguf", kind)
            return folder / "model.gguf"

        yield Case(f"gguf: a link to or a {kind}", write, linked, "model.gguf", error=error)
    long = "x" * 300 + ".gguf"
    yield Case("gguf: a name of 300 letters", lambda f: f / long, linked, long)
    yield Case(
        "gguf: a zero byte in the path", lambda f: f / "a\0b", linked, "", error=RapsheeError
    )
    yield Case(
        "gguf: a name that is no text",
        lambda folder: broken_name(folder, Gguf().build()[:-1]),
        lambda folder: broken_name(folder, Gguf().build()),
        "model-",
    )
    headers = {
        "zeros": b"",
        "keys": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 16),
        "a text": struct.pack("<4sIQQQ1sIQ", b"GGUF", 3, 0, 1, 1, b"k", 8, 1 << 35),
        "an array": struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1 << 23),
        "numbers": struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 12, 1 << 23),
        "lists": struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1 << 23),
    }
    for label, begin in headers.items():

        def sparse(folder: Path, begin: bytes = begin) -> Path:
            make_hole(folder / "model.gguf", begin)
            return folder / "model.gguf"

        yield Case(f"gguf: a hole of 64 GiB as {label}", sparse, linked, "model.gguf")


def broken_name(folder: Path, data: bytes) -> Path:
    """A file whose name is not UTF-8."""
    path = Path(os.fsdecode(os.fsencode(folder) + b"/model-\xff.gguf"))
    path.write_bytes(data)
    return path


def folder_kinds() -> Iterator[Case]:
    for file in ("model.safetensors", *_TEXT_FILES):
        for kind in ("folder", "pipe", "socket", "/dev/zero", "loop", "hole"):

            def write(folder: Path, file: str = file, kind: str = kind) -> Path:
                Folder().write(folder)
                (folder / file).unlink(missing_ok=True)
                if kind == "hole":
                    make_hole(folder / file)
                else:
                    make_kind(folder / file, kind)
                return folder

            is_text = "tokenizer" in file or "template" in file or "special" in file
            yield Case(
                f"{file}: a link to or a {kind}",
                write,
                linked_folder,
                file,
                stage="tokenizer" if is_text else "checkpoint",
            )
    for file in ("config.json", "tokenizer.json", "model.safetensors"):

        def without(folder: Path, file: str = file) -> Path:
            Folder().write(folder)
            (folder / file).unlink()
            return folder

        yield Case(
            f"{file}: absent",
            without,
            linked_folder,
            file,
            stage="tokenizer" if file == "tokenizer.json" else "checkpoint",
            error=WeightFileError if file == "tokenizer.json" else ConfigError,
        )


def linked_folder(folder: Path) -> Path:
    """As in Hugging Face's cache: every file is a link to a blob outside."""
    blobs, snapshot = folder / "blobs", folder / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    Folder().write(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    return snapshot


def kind_cases() -> list[Case]:
    return [*gguf_kinds(), *folder_kinds()]
