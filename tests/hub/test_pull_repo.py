"""Models of the hub: what is taken, kept, resumed and refused."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine.errors import DownloadError
from rapshee_engine.hub import download, pull_repo

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny"
WEIGHTS = "model.safetensors"

Pull = Callable[..., Path]


@pytest.fixture
def pull(tmp_path: Path, environ: dict[str, str]) -> Pull:
    def pull(**options: Any) -> Path:
        return pull_repo(options.pop("repo", REPO), tmp_path, environ, **options)

    return pull


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def parts(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


def test_the_files_of_a_model_are_taken_and_no_others(pull: Pull, hub: Any) -> None:
    folder = pull()
    wanted = {"config.json", "tokenizer.json", WEIGHTS}
    assert contents(folder) == {name: hub.files[name] for name in wanted}
    assert {name for name, _ in hub.downloads()} == wanted
    assert all(authorization is None for _, _, authorization in hub.asked)


def test_what_is_there_is_not_downloaded_again(pull: Pull, hub: Any) -> None:
    first = pull()
    hub.asked.clear()
    assert pull() == first
    assert hub.downloads() == []


def test_a_new_commit_takes_what_changed(pull: Pull, hub: Any) -> None:
    first = pull()
    hub.asked.clear()
    hub.commit = "f" * 40
    hub.files["config.json"] = b'{"model_type": "qwen3"}'
    second = pull()
    assert second != first
    assert [name for name, _ in hub.downloads()] == ["config.json"]
    assert (second / "config.json").read_bytes() == hub.files["config.json"]
    assert (second / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_a_token_is_sent_along(pull: Pull, hub: Any, environ: dict[str, str]) -> None:
    environ["HF_TOKEN"] = "hf_secret"
    pull()
    assert {authorization for _, _, authorization in hub.asked} == {"Bearer hf_secret"}


def test_an_interrupted_connection_is_taken_up_again(pull: Pull, hub: Any) -> None:
    hub.cut_after = 1000
    folder = pull()
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert [r for name, r in hub.downloads() if name == WEIGHTS] == ["bytes=0-", "bytes=1000-"]


def test_an_interrupted_command_is_taken_up_again(pull: Pull, hub: Any, tmp_path: Path) -> None:
    hub.cut_after, hub.stays_cut = 0, True
    hub.files = {WEIGHTS: hub.files[WEIGHTS]}
    with pytest.raises(DownloadError, match=r"lost after 0 of 10240 bytes of model\.safetensors"):
        pull()
    (part,) = parts(tmp_path)
    part.write_bytes(hub.files[WEIGHTS][:4000])
    hub.cut_after = None
    hub.asked.clear()
    assert contents(pull()) == hub.files
    assert hub.downloads() == [(WEIGHTS, "bytes=4000-")]
    assert parts(tmp_path) == []


def test_a_hub_without_ranges_sends_all_again(pull: Pull, hub: Any) -> None:
    hub.cut_after, hub.ignores_ranges = 1000, True
    assert (pull() / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_wrong_file_is_thrown_away(pull: Pull, hub: Any, tmp_path: Path, name: str) -> None:
    right = hub.files[name]
    listing = hub.listing()
    hub.files[name] = right[:-1] + b"x"
    hub.listing = lambda: listing
    with pytest.raises(DownloadError, match=rf"{name} has the checksum \w+, expected \w+"):
        pull()
    assert parts(tmp_path) == []
    hub.files[name] = right
    assert (pull() / name).read_bytes() == right


def test_more_bytes_than_there_are(pull: Pull, hub: Any, tmp_path: Path) -> None:
    listing = hub.listing()
    hub.files[WEIGHTS] += b"x"
    hub.listing = lambda: listing
    with pytest.raises(DownloadError, match="longer than the 10240 bytes"):
        pull()
    assert parts(tmp_path) == []


def test_one_gguf_file_of_several(pull: Pull, hub: Any) -> None:
    hub.files = {"a-q4.gguf": b"GGUF4", "sub/a-q8.gguf": b"GGUF8", "README.md": b""}
    path = pull(file="sub/a-q8.gguf")
    assert path.read_bytes() == b"GGUF8"
    assert path.name == "a-q8.gguf"
    with pytest.raises(DownloadError, match=r"one of\n  org/tiny:a-q4\.gguf\n  org/tiny:sub/"):
        pull()
    with pytest.raises(DownloadError, match=r"no file b\.gguf; it has: a-q4\.gguf, sub/a-q8"):
        pull(file="b.gguf")


def test_the_only_gguf_file_needs_no_name(pull: Pull, hub: Any) -> None:
    hub.files = {"a.gguf": b"GGUF", "config.json": b"{}"}
    assert pull().read_bytes() == b"GGUF"


def test_shards(pull: Pull, hub: Any) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": b"%d" % i for i in (1, 2)}
    hub.files = {"model.safetensors.index.json": b"{}", "config.json": b"", **shards}
    assert contents(pull()) == hub.files


def test_files_by_pattern(pull: Pull) -> None:
    assert set(contents(pull(include=["*.md", "tok*"]))) == {"README.md", "tokenizer.json"}
    with pytest.raises(DownloadError, match=r"nothing that matches \*\.xyz"):
        pull(include=["*.xyz"])


def test_no_weights(pull: Pull, hub: Any) -> None:
    hub.files = {"README.md": b""}
    with pytest.raises(DownloadError, match=r"neither .* nor a GGUF file; it has: README"):
        pull()


def test_revisions(pull: Pull, hub: Any) -> None:
    with pytest.raises(DownloadError, match="no revision 'v2'"):
        pull(revision="v2")
    hub.revision = "v2"
    assert (pull(revision="v2") / WEIGHTS).exists()


def test_no_such_model(pull: Pull) -> None:
    with pytest.raises(DownloadError, match=r"cannot fetch org/none: there is no such model on"):
        pull(repo="org/none")


@pytest.mark.parametrize(
    ("status", "code", "token", "message"),
    [
        (403, "GatedRepo", "", "accept its conditions"),
        (401, "", "hf_old", "does not accept the token in HF_TOKEN"),
        (401, "", "", "no such model .* or it is private"),
        (500, "", "", "answered 500"),
    ],
)
def test_refusals(
    pull: Pull,
    hub: Any,
    environ: dict[str, str],
    status: int,
    code: str,
    token: str,
    message: str,
) -> None:
    hub.api_error = (status, code)
    environ["HF_TOKEN"] = token
    with pytest.raises(DownloadError, match=message):
        pull()


def test_without_a_network_what_was_downloaded_is_used(
    pull: Pull, environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pull()
    environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert pull() == folder
    assert "cannot be reached" in capsys.readouterr().err
    with pytest.raises(DownloadError, match=r"cannot be reached .*README\.md was never downloaded"):
        pull(include=["README.md"])
    with pytest.raises(DownloadError, match=r"cannot be reached .*never downloaded before"):
        pull(revision="v2")
    assert pull(revision=COMMIT) == folder


def test_offline_nobody_is_asked(pull: Pull, hub: Any, environ: dict[str, str]) -> None:
    environ["HF_HUB_OFFLINE"] = "1"
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set, and it was never downloaded"):
        pull()
    assert hub.asked == []
    del environ["HF_HUB_OFFLINE"]
    folder = pull()
    hub.asked.clear()
    environ["HF_HUB_OFFLINE"] = "1"
    assert pull() == folder
    assert hub.asked == []


def test_too_little_room_is_found_before_anything_is_downloaded(
    pull: Pull, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"needs 10 kB more in .* set RAPSHEE_CACHE"):
        pull()
    assert hub.downloads() == []


def test_a_full_disk(pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "_fetch_more", full)
    with pytest.raises(DownloadError, match="No space left on device; set RAPSHEE_CACHE"):
        pull()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "a/../b", "a\\b", "", "a\0b"])
def test_names_that_lead_elsewhere(pull: Pull, hub: Any, name: str) -> None:
    hub.files = {name: b"", WEIGHTS: b""}
    with pytest.raises(DownloadError, match="no relative path"):
        pull()


@pytest.mark.parametrize(
    "changes",
    [{"size": -1}, {"size": None}, {"blobId": "x", "lfs": None}, {"blobId": "../" * 13 + "a"}],
)
def test_listings_that_cannot_be(pull: Pull, hub: Any, changes: dict[str, Any]) -> None:
    hub.files = {"config.json": b""}
    hub.listing_changes = changes
    with pytest.raises(DownloadError, match="the hub gives"):
        pull()


def test_a_commit_that_cannot_be(pull: Pull, hub: Any) -> None:
    hub.commit = "../../x"
    with pytest.raises(DownloadError, match="names a commit"):
        pull()


def test_something_that_is_no_hub(pull: Pull, hub: Any) -> None:
    hub.listing = lambda: "welcome"
    with pytest.raises(DownloadError, match="not as a hub does"):
        pull()
