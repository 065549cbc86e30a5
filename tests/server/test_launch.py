"""A server process: what is checked before it starts, and what its operator reads."""

from __future__ import annotations

import io
import shlex
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from rapshee_engine.errors import ConfigError, WeightFileError
from rapshee_engine.server import launch as launch_module
from rapshee_engine.server.launch import LaunchOptions, launch

Send = Callable[..., httpx.Response]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Launched:
    """Launches servers whose HTTP part is replaced: it announces itself and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Any, home: Path) -> None:
        self.home = home
        self.while_serving: Callable[[Any], None] = lambda _app: None
        self.loaded: list[tuple[str, dict[str, Any]]] = []
        self.closed = 0
        self.end_requests: Callable[[], None]
        self.load_error: Exception | None = None

        def load(model: str, **options: Any) -> Any:
            if self.load_error is not None:
                raise self.load_error
            self.loaded.append((model, options))
            engine.close = self._count_close
            return engine

        def serve(app: Any, *_: Any, on_listening: Any, end_requests: Any, **_options: Any) -> None:
            self.end_requests = end_requests
            on_listening()
            self.while_serving(app)

        monkeypatch.setattr(launch_module, "AsyncEngine", load)
        monkeypatch.setattr(launch_module, "serve", serve)

    def _count_close(self) -> None:
        self.closed += 1

    def __call__(self, **options: Any) -> None:
        defaults = {"models": {"a": "/m", "b": "/m"}, "home": self.home, "port": 0}
        launch(LaunchOptions(**{**defaults, **options}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, engine: Any, tmp_path: Path) -> Launched:
    return Launched(monkeypatch, engine, tmp_path / "my home")


def set_streams(monkeypatch: pytest.MonkeyPatch, stdout: io.StringIO, stderr: io.StringIO) -> None:
    streams = SimpleNamespace(stdout=stdout, stderr=stderr)
    monkeypatch.setattr(launch_module, "sys", streams)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard output, a terminal."""
    stream = Terminal()
    set_streams(monkeypatch, stream, io.StringIO())
    return stream


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard output, redirected to a file, as is the error output."""
    stream = io.StringIO()
    set_streams(monkeypatch, stream, io.StringIO())
    return stream


@pytest.fixture
def status(launched: Launched, send: Send) -> Callable[..., list[int]]:
    """Launches, and returns the status that each key gets."""

    def statuses(*keys: str | None, **options: Any) -> list[int]:
        found: list[int] = []

        def ask(app: Any) -> None:
            answers = (send("GET", "/v1/models", app=app, key=key) for key in keys)
            found.extend(answer.status_code for answer in answers)

        launched.while_serving = ask
        launched(**options)
        return found

    return statuses


def curl_arguments(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("curl ")]
    return shlex.split(line)


def shown_key(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("API key: ")]
    return line.split()[2]


def test_names_of_one_path_share_an_engine(launched: Launched) -> None:
    launched(models={"a": "/m", "b": "/m", "c": "/n"}, engine_options={"threads": 2})
    assert launched.loaded == [("/m", {"threads": 2}), ("/n", {"threads": 2})]
    assert launched.closed == 2
    launched.end_requests()
    assert launched.closed > 2


def test_the_first_key_is_shown_on_a_terminal_only_once(
    launched: Launched, terminal: Terminal, status: Callable[..., list[int]]
) -> None:
    launched()
    first = terminal.getvalue()
    key = shown_key(first)
    assert f"Authorization: Bearer {key}" in curl_arguments(first)
    assert first.endswith("\nready\n")
    assert not (launched.home / "initial-key").exists()

    assert status(key, "wrong") == [200, 401]
    second = terminal.getvalue()[len(first) :]
    assert key not in second
    assert "--api-key" in second


def test_a_terminal_on_the_error_output_will_do(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, stream = io.StringIO(), Terminal()
    set_streams(monkeypatch, file, stream)
    launched()
    assert shown_key(stream.getvalue()).startswith("rk-")
    assert file.getvalue() == ""


def test_without_a_terminal_the_key_goes_to_a_file(
    launched: Launched, file: io.StringIO, status: Callable[..., list[int]]
) -> None:
    path = launched.home / "initial-key"
    for _ in range(2):
        file.truncate(file.seek(0))
        launched()
        text = file.getvalue()
        key = path.read_text().strip()
        assert key not in text
        assert f"API key: in {path}" in text
        assert f"Authorization: Bearer $(cat '{path}')" in curl_arguments(text)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert status(key) == [200]


def test_a_start_that_fails_does_not_use_up_the_first_key(
    launched: Launched, terminal: Terminal
) -> None:
    launched.load_error = WeightFileError("/m", "broken")
    with pytest.raises(WeightFileError):
        launched()
    assert "rk-" not in terminal.getvalue()
    launched.load_error = None
    launched()
    assert shown_key(terminal.getvalue()).startswith("rk-")


def test_given_keys(terminal: Terminal, status: Callable[..., list[int]]) -> None:
    given = {"given_keys": ("secret-one", "two"), "given_key_hint": "$RAPSHEE_API_KEY"}
    assert status("secret-one", "two", "three", **given) == [200, 200, 401]
    text = terminal.getvalue()
    assert "secret-one" not in text
    assert "Authorization: Bearer $RAPSHEE_API_KEY" in curl_arguments(text)


def test_the_line_to_paste_asks_the_first_model(launched: Launched, terminal: Terminal) -> None:
    launched(authenticate=False)
    arguments = curl_arguments(terminal.getvalue())
    assert arguments[1].startswith("http://127.0.0.1:")
    assert arguments[1].endswith("/v1/chat/completions")
    assert arguments[2:4] == ["-H", "Content-Type: application/json"]
    assert arguments[4] == "-d"
    response = httpx.Response(200, content=arguments[5]).json()
    assert response["model"] == "a"


def test_without_authentication_no_home_is_touched(
    launched: Launched, terminal: Terminal, status: Callable[..., list[int]]
) -> None:
    for host in ("127.0.0.1", "localhost"):
        assert status(None, authenticate=False, host=host) == [200]
    assert not launched.home.exists()
    assert "none needed" in terminal.getvalue()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com"])
def test_no_authentication_needs_a_loopback_host(launched: Launched, host: str) -> None:
    with pytest.raises(ConfigError, match="--no-auth needs a loopback host"):
        launched(authenticate=False, host=host)
    assert launched.loaded == []


def test_a_port_in_use_is_found_before_a_model_is_loaded(launched: Launched) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ConfigError, match="--port"),
    ):
        launched(port=other.getsockname()[1])
    assert launched.loaded == []


def test_an_unwritable_home_is_found_before_a_model_is_loaded(
    launched: Launched, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="RAPSHEE_HOME"):
        launched(home=tmp_path / "file")
    assert launched.loaded == []


def test_an_address_for_all_interfaces_is_shown_as_localhost(
    launched: Launched, terminal: Terminal
) -> None:
    launched(host="0.0.0.0")
    assert "http://localhost:" in terminal.getvalue()
