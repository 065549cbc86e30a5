"""A stand-in for the hub: the few addresses that are asked for, on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny"


@dataclass
class StandIn:
    """What it serves, what should go wrong, and what it was asked.

    Attributes:
        files: path -> content of `REPO` at ``revision``.
        cut_after: bytes of a weight file after which a connection breaks; then None again.
        api_error: status and ``x-error-code`` that answer every question about a repository.
        asked: (path, range or None, authorization or None) of each request.
    """

    files: dict[str, bytes]
    revision: str = "main"
    commit: str = COMMIT
    cut_after: int | None = None
    stays_cut: bool = False
    ignores_ranges: bool = False
    api_error: tuple[int, str] | None = None
    listing_changes: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[tuple[str, str | None]]:
        """Files that were asked for, with their ranges."""
        marker = f"/resolve/{self.commit}/"
        return [(p.partition(marker)[2], r) for p, r, _ in self.asked if marker in p]

    def listing(self) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest(),
                **_lfs(name, content),
                **self.listing_changes,
            }
            for name, content in self.files.items()
        ]
        return {"id": REPO, "sha": self.commit, "siblings": siblings}


def _lfs(name: str, content: bytes) -> dict[str, Any]:
    if not name.endswith((".safetensors", ".gguf")):
        return {}
    sha256 = hashlib.sha256(content).hexdigest()
    return {"lfs": {"sha256": sha256, "size": len(content), "pointerSize": 130}}


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append((path, self.headers["range"], self.headers["authorization"]))
            marker = f"/{REPO}/resolve/{hub.commit}/"
            if path.startswith(marker) and path.removeprefix(marker) in hub.files:
                self._send_file(hub.files[path.removeprefix(marker)])
            elif path.startswith("/api/models/") and hub.api_error is not None:
                self._send(hub.api_error[0], b"{}", {"x-error-code": hub.api_error[1]})
            elif path == f"/api/models/{REPO}/revision/{hub.revision}":
                self._send(200, json.dumps(hub.listing()).encode(), {})
            elif path.startswith(f"/api/models/{REPO}/"):
                self._send(404, b"{}", {"x-error-code": "RevisionNotFound"})
            else:
                self._send(404, b"{}", {"x-error-code": "RepoNotFound"})

        def _send_file(self, content: bytes) -> None:
            start = 0
            if self.headers["range"] and not hub.ignores_ranges:
                start = int(self.headers["range"].removeprefix("bytes=").removesuffix("-"))
            body = content[start:]
            extent = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cut = hub.cut_after
            if cut is not None and len(body) > cut:
                hub.cut_after = cut if hub.stays_cut else None
                self.close_connection = True
            else:
                cut = None
            self._send(200 if hub.ignores_ranges else 206, body, {"content-range": extent}, cut)

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:cut])

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[StandIn]:
    files = {
        "README.md": b"# tiny\n",
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors": bytes(range(256)) * 40,
        "pytorch_model.bin": b"not for us",
        "consolidated.safetensors": b"nor this",
    }
    stand_in = StandIn(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stand_in))
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def environ(hub: StandIn) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": ""}
