"""A server process from its options: keys, engines, socket, and what its operator reads."""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.errors import ConfigError
from rapshee_engine.server.app import build_app
from rapshee_engine.server.drain import Drain
from rapshee_engine.server.registry import EngineRegistry
from rapshee_engine.server.serve import bind, serve
from rapshee_engine.server.settings import ServerSettings
from rapshee_engine.tenancy.keys import Keyring, KeyStore

__all__ = ["LaunchOptions", "launch"]

INITIAL_KEY_FILE = "initial-key"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What a server process is made from.

    Attributes:
        models: served name -> path; names with the same path share one engine.
        engine_options: keyword arguments of every `AsyncEngine`, without ``model``.
        home: folder of the server's state; not touched without authentication.
        given_keys: API keys that are accepted besides the stored ones.
        given_key_hint: how a shell gets one of ``given_keys``, for the line to paste.
        authenticate: False: no keys at all; the host must be a loopback address.
    """

    models: Mapping[str, str]
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    home: Path
    given_keys: tuple[str, ...] = ()
    given_key_hint: str = ""
    authenticate: bool = True
    settings: ServerSettings = field(default_factory=ServerSettings)


def launch(options: LaunchOptions) -> None:
    """Serve until SIGINT or SIGTERM, drain, then give everything back.

    What can be wrong without a model is found before any is loaded.

    Raises:
        ConfigError: an option is wrong; the message says what to change.
    """
    if not options.authenticate and not _is_loopback(options.host):
        raise ConfigError(
            f"--no-auth needs a loopback host such as 127.0.0.1, not {options.host}: anybody who "
            "reaches the server could use it"
        )
    with ExitStack() as stack:
        listener = stack.enter_context(bind(options.host, options.port))
        store = None
        if options.authenticate:
            store = KeyStore(options.home)
            stack.callback(store.close)
        engines = _load_engines(options, stack)
        registry = EngineRegistry(
            engines, created=int(time.time()), max_pending=options.settings.max_pending
        )
        identify = Keyring(store, options.given_keys).identify if options.authenticate else None
        drain = Drain()
        app = build_app(registry, options.settings, identify=identify, drain=drain)
        # A first key is made only now, so that a start that fails does not use it up unseen.
        access = _Access.prepare(options, store)
        url = _url(options.host, listener)
        serve(
            app,
            options.settings,
            listener,
            drain=drain,
            on_listening=lambda: _announce(url, list(options.models), access),
            end_requests=lambda: _close_all(engines.values()),
        )


def _load_engines(options: LaunchOptions, stack: ExitStack) -> dict[str, AsyncEngine]:
    by_path: dict[str, AsyncEngine] = {}
    for path in options.models.values():
        if path not in by_path:
            by_path[path] = AsyncEngine(model=path, **options.engine_options)
            stack.callback(by_path[path].close)
    return {name: by_path[path] for name, path in options.models.items()}


def _close_all(engines: Iterable[AsyncEngine]) -> None:
    for engine in engines:
        engine.close()


@dataclass(frozen=True, slots=True)
class _Access:
    """How to get in: a note for the operator, and the key as a shell word for a line to paste."""

    note: str
    shell_key: str | None

    @classmethod
    def prepare(cls, options: LaunchOptions, store: KeyStore | None) -> _Access:
        if store is None:
            return cls("none needed: this machine only", None)
        if options.given_keys:
            return cls("as given at the start", options.given_key_hint)
        key_file = options.home / INITIAL_KEY_FILE
        shell_key = f"$(cat {shlex.quote(str(key_file))})"
        shown: list[str] = []
        hand_over: Callable[[str], None] = (
            shown.append if _terminal() else lambda key: _write_private(key_file, key)
        )
        if not store.create_first(hand_over):
            if key_file.exists():
                return cls(f"in {key_file}", shell_key)
            return cls(
                "made at the first start. Lost? Add one with --api-key, or delete "
                f"{store.path} to get a new one",
                "YOUR_KEY",
            )
        if shown:
            return cls(f"{shown[0]}  (shown only this once)", shown[0])
        return cls(f"in {key_file}", shell_key)


def _announce(url: str, names: list[str], access: _Access) -> None:
    # Greedy, so that whoever pastes the line twice sees the same answer twice.
    question = {"role": "user", "content": "In one sentence, what is the moon?"}
    body = {"model": names[0], "messages": [question], "temperature": 0}
    header = "" if access.shell_key is None else f'-H "Authorization: Bearer {access.shell_key}" '
    data = shlex.quote(msgspec.json.encode(body).decode())
    print(
        f"Models:  {', '.join(names)}\n"
        f"URL:     {url}/v1\n"
        f"API key: {access.note}\n\n"
        f"curl {url}/v1/chat/completions {header}"
        f'-H "Content-Type: application/json" -d {data}\n\n'
        "ready",
        file=_terminal() or sys.stdout,
        flush=True,
    )


def _terminal() -> Any:
    """The stream that a person reads, None if there is none."""
    return next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)


def _write_private(path: Path, key: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{key}\n")
        file.flush()
        os.fsync(file.fileno())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url(host: str, listener: socket.socket) -> str:
    """Where a client on this machine reaches the server."""
    port = listener.getsockname()[1]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:
        return f"http://localhost:{port}"
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"
