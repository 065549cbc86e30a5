"""One file of the hub: resumed where it was interrupted, and checked before it counts.

The hub's own library begins anew after an interruption, and looks at a file's size alone.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import get_session, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from rapshee_engine.errors import DownloadError
from rapshee_engine.hub.listing import RepoFile

__all__ = ["fetch_file"]

_TIMEOUT_S = 30.0
_COPY_BYTES = 1 << 20
_MOST_FRUITLESS_TRIES = 3


def fetch_file(url: str, headers: Mapping[str, str], file: RepoFile, path: Path) -> None:
    """Download to ``path``; what came of an earlier try lies in ``path``'s ``.part`` file.

    Raises:
        DownloadError: the file did not come, or is another one than the hub says.
        OSError: it cannot be written.
    """
    part = path.with_suffix(".part")
    with tqdm(
        total=file.nbytes,
        unit="B",
        unit_scale=True,
        desc=file.path,
        disable=not sys.stderr.isatty(),
    ) as bar:
        _fetch_all(url, headers, file, part, bar)
    digest = _digest(part, file)
    if digest != file.digest:
        part.unlink()
        raise DownloadError(f"{file.path} has the checksum {digest}, expected {file.digest}")
    os.replace(part, path)


def _fetch_all(
    url: str, headers: Mapping[str, str], file: RepoFile, part: Path, bar: tqdm[Any]
) -> None:
    """Until all bytes are there, over as many connections as it takes, if each brings some."""
    fruitless_tries = 0
    part.touch()
    while True:
        before = part.stat().st_size
        bar.update(before - bar.n)
        if before == file.nbytes:
            return
        try:
            _fetch_more(url, headers, file, part, bar)
            reason = "it ended early"
        except httpx2.RequestError as error:
            reason = str(error) or type(error).__name__
        now = part.stat().st_size
        if now > file.nbytes:
            part.unlink()
            raise DownloadError(f"{file.path} is longer than the {file.nbytes} bytes expected")
        fruitless_tries = 0 if now > before else fruitless_tries + 1
        if now < file.nbytes and fruitless_tries == _MOST_FRUITLESS_TRIES:
            raise DownloadError(
                f"the connection was lost after {now} of {file.nbytes} bytes of {file.path} "
                f"({reason}); the same command goes on from there"
            )


def _fetch_more(
    url: str, headers: Mapping[str, str], file: RepoFile, part: Path, bar: tqdm[Any]
) -> None:
    """Append what one connection brings."""
    have = part.stat().st_size
    # Compressed bytes could not be counted.
    asked = {**headers, "accept-encoding": "identity", "range": f"bytes={have}-"}
    stream = get_session().stream(
        "GET", url, headers=asked, timeout=_TIMEOUT_S, follow_redirects=True
    )
    with stream as response, part.open("r+b") as target:
        _require_success(response, file)
        target.seek(have if response.status_code == 206 else 0)
        target.truncate()
        for piece in response.iter_bytes():
            target.write(piece)
            bar.update(target.tell() - bar.n)
            if target.tell() > file.nbytes:
                return


def _require_success(response: Any, file: RepoFile) -> None:
    try:
        hf_raise_for_status(response)
    except HfHubHTTPError:
        reason = {401: "it is not for us", 403: "it is not for us", 404: "it is not there"}
        status = response.status_code
        raise DownloadError(
            f"the hub answered {status} for {file.path} ({reason.get(status, 'it has a problem')})"
        ) from None


def _digest(path: Path, file: RepoFile) -> str:
    """The kind of digest that the hub gave for the file; its bytes are on the disk then."""
    if len(file.digest) == 64:
        digest = hashlib.sha256()
    else:  # as git names a blob
        digest = hashlib.sha1(f"blob {file.nbytes}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(_COPY_BYTES):
            digest.update(piece)
        os.fsync(stream.fileno())
    return digest.hexdigest()
