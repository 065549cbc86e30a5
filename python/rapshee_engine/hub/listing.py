"""What a repository consists of, and which of it a model needs."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rapshee_engine.errors import DownloadError

__all__ = ["Listing", "RepoFile", "choose_files"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_PART = re.compile(r"[^/\\\0]+")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_NEEDED = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
)
_MOST_NAMED = 40


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file of a repository.

    Attributes:
        path: relative, inside the repository.
        nbytes: its size.
        digest: SHA-256 of the content, or, 40 digits long, git's SHA-1 of it as a blob.

    Raises:
        DownloadError: the hub says what cannot be.
    """

    path: str
    nbytes: int
    digest: str

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if not all(_PART.fullmatch(part) and part not in (".", "..") for part in parts):
            raise DownloadError(f"the hub lists a file {self.path!r}, which is no relative path")
        if type(self.nbytes) is not int or self.nbytes < 0:
            raise DownloadError(f"the hub gives {self.path} a size of {self.nbytes!r}")
        if not _DIGEST.fullmatch(self.digest):
            raise DownloadError(f"the hub gives {self.path} a checksum {self.digest!r}")


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a commit."""

    commit: str
    files: tuple[RepoFile, ...]

    def __post_init__(self) -> None:
        if not _COMMIT.fullmatch(self.commit):
            raise DownloadError(f"the hub names a commit {self.commit!r}")

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Listing:
        fields = json.loads(data)
        return cls(fields["commit"], tuple(RepoFile(**file) for file in fields["files"]))


def choose_files(
    listing: Listing, repo: str, file: str | None, include: Sequence[str]
) -> list[RepoFile]:
    """The files that a model needs, or that were asked for; arguments as in `pull_repo`.

    Raises:
        DownloadError: there are none, or the choice is not clear; the message says what there is.
    """
    if file is not None:
        return _required(listing, [f for f in listing.files if f.path == file], f"no file {file}")
    if include:
        patterns = ", ".join(include)
        chosen = [f for f in listing.files if any(fnmatch.fnmatchcase(f.path, p) for p in include)]
        return _required(listing, chosen, f"nothing that matches {patterns}")
    if any(_WEIGHTS.fullmatch(f.path) for f in listing.files):
        return [f for f in listing.files if f.path in _NEEDED or _WEIGHTS.fullmatch(f.path)]
    ggufs = [f for f in listing.files if f.path.endswith(".gguf")]
    if len(ggufs) > 1:
        names = "\n".join(f"  {repo}:{f.path}" for f in ggufs[:_MOST_NAMED])
        raise DownloadError(f"it has several GGUF files; choose one of\n{names}")
    return _required(listing, ggufs, "neither model.safetensors nor a GGUF file")


def _required(listing: Listing, chosen: list[RepoFile], what: str) -> list[RepoFile]:
    if not chosen:
        names = ", ".join(f.path for f in listing.files[:_MOST_NAMED])
        raise DownloadError(f"it has {what}; it has: {names or 'nothing'}")
    return chosen
