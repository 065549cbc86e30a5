"""Models from the Hugging Face hub, kept in the cache folder.

A file takes its name only when its checksum was right, and a download that was interrupted goes on
where it stopped. In ``hub/ORG/NAME``: ``blobs/`` has files by digest, ``snapshots/COMMIT/`` links
to them by name, ``listings/COMMIT.json`` says what the commit consists of, ``refs/`` which commit a
revision was when it was last seen.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from rapshee_engine.errors import DownloadError
from rapshee_engine.hub.client import HubClient, HubUnreachableError
from rapshee_engine.hub.download import fetch_file
from rapshee_engine.hub.listing import Listing, RepoFile, choose_files

__all__ = ["pull_repo"]


def pull_repo(
    repo: str,
    cache: Path,
    environ: Mapping[str, str],
    *,
    file: str | None = None,
    revision: str = "main",
    include: Sequence[str] = (),
) -> Path:
    """Path of a model of the hub, downloaded as far as it is not there yet.

    Args:
        repo: ``org/name``.
        file: one GGUF file of it; else its safetensors with what belongs to them, or its only GGUF.
        include: shell patterns of the files to take instead.

    Returns:
        The GGUF file, or the folder.

    Raises:
        DownloadError: it cannot be had; the message says why.
    """
    folder = cache / "hub" / repo
    try:
        with _exclusive(folder):
            return _Repo(repo, revision, folder, HubClient(environ)).pull(file, include)
    except DownloadError as error:
        raise DownloadError(f"cannot fetch {repo}: {error}") from None
    except OSError as error:
        raise DownloadError(
            f"cannot write {error.filename or folder}: {error.strerror}; set RAPSHEE_CACHE to a "
            "folder with enough room"
        ) from None


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Repo:
    """One revision of a repository, and its folder in the cache."""

    def __init__(self, name: str, revision: str, folder: Path, client: HubClient) -> None:
        self._name = name
        self._revision = revision
        self._folder = folder
        self._client = client

    def pull(self, file: str | None, include: Sequence[str]) -> Path:
        try:
            listing = self._client.listing(self._name, self._revision)
        except HubUnreachableError as error:
            return self._from_cache(file, include, str(error))
        chosen = choose_files(listing, self._name, file, include)
        self._download(listing, chosen)
        self._remember(listing)
        return self._result(listing, chosen, is_folder=bool(include))

    def _download(self, listing: Listing, chosen: Sequence[RepoFile]) -> None:
        missing = {f.digest: f for f in chosen if not self._blob(f).exists()}
        num_bytes = sum(f.nbytes for f in missing.values())
        if missing:
            print(f"Downloading {self._name} ({_size(num_bytes)})", file=sys.stderr)
            blobs = self._folder / "blobs"
            blobs.mkdir(exist_ok=True)
            self._require_room(blobs, missing.values())
        for repo_file in missing.values():
            url, headers = self._client.address(self._name, listing.commit, repo_file.path)
            fetch_file(url, headers, repo_file, self._blob(repo_file))
        for repo_file in chosen:
            _link(self._blob(repo_file), self._snapshot(listing) / repo_file.path)

    def _require_room(self, blobs: Path, files: Iterable[RepoFile]) -> None:
        free = shutil.disk_usage(blobs).free
        wanted = 0
        for repo_file in files:
            part = self._blob(repo_file).with_suffix(".part")
            wanted += repo_file.nbytes - (part.stat().st_size if part.exists() else 0)
        if wanted > free:
            raise DownloadError(
                f"it needs {_size(wanted)} more in {blobs}, and {_size(free)} are free; set "
                "RAPSHEE_CACHE to a folder with enough room"
            )

    def _remember(self, listing: Listing) -> None:
        """For a start without the hub."""
        _write(self._folder / "listings" / f"{listing.commit}.json", listing.to_json())
        _write(self._ref(), listing.commit.encode())

    def _from_cache(self, file: str | None, include: Sequence[str], reason: str) -> Path:
        try:
            commit = self._ref().read_text() if self._ref().exists() else self._revision
            path = self._folder / "listings" / f"{quote(commit, safe='')}.json"
            listing = Listing.from_json(path.read_bytes())
        except FileNotFoundError:
            raise DownloadError(f"{reason}, and it was never downloaded before") from None
        chosen = choose_files(listing, self._name, file, include)
        missing = [f.path for f in chosen if not (self._snapshot(listing) / f.path).exists()]
        if missing:
            raise DownloadError(f"{reason}, and {', '.join(missing)} was never downloaded before")
        print(f"{reason}: taking {self._name} as it was downloaded before", file=sys.stderr)
        return self._result(listing, chosen, is_folder=bool(include))

    def _result(self, listing: Listing, chosen: Sequence[RepoFile], *, is_folder: bool) -> Path:
        snapshot = self._snapshot(listing)
        is_gguf = len(chosen) == 1 and chosen[0].path.endswith(".gguf") and not is_folder
        return snapshot / chosen[0].path if is_gguf else snapshot

    def _snapshot(self, listing: Listing) -> Path:
        return self._folder / "snapshots" / listing.commit

    def _blob(self, repo_file: RepoFile) -> Path:
        return self._folder / "blobs" / repo_file.digest

    def _ref(self) -> Path:
        return self._folder / "refs" / quote(self._revision, safe="")


def _link(blob: Path, path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(blob, path)
    except OSError:  # some file systems have no hard links
        path.symlink_to(blob.resolve())


def _write(path: Path, content: bytes) -> None:
    """As a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} kB"
