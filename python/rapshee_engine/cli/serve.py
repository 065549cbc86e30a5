"""``rapshee-engine serve``."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapshee_engine.cli.common import add_command
from rapshee_engine.cli.engine_options import add_engine_options, engine_options
from rapshee_engine.cli.models import add_revision_option, find_model
from rapshee_engine.errors import ConfigError
from rapshee_engine.pull import DEFAULT_MODEL
from rapshee_engine.server.launch import LaunchOptions, launch
from rapshee_engine.server.logs import LOG_FORMATS, LOG_LEVELS, configure_logging
from rapshee_engine.server.settings import ServerSettings
from rapshee_engine.tenancy.keys import check_key_text, home_folder

__all__ = ["add"]

_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
# The hosted API's names, for clients that know them.
_DEFAULT_NAMES = ("rapshee-1", "rapshee-1-mini")


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "serve",
        _serve,
        "serve models over HTTP until interrupted",
        "examples:\n"
        "  rapshee-engine serve\n"
        "  rapshee-engine serve --model tiny=./tiny.gguf --model big=./big-folder --port 9000\n"
        "  RAPSHEE_API_KEY=secret rapshee-engine serve --host 0.0.0.0\n\n"
        "The first start makes an API key, shows it on the terminal (or writes it to a file if\n"
        "there is none) and keeps its hash in $RAPSHEE_HOME (~/.local/share/rapshee-engine).\n"
        "Without --model, the first start downloads the default model as `pull` does.",
    )
    command.add_argument(
        "--model",
        metavar="[NAME=]MODEL",
        action="append",
        type=_named_model,
        default=[],
        help="serve a GGUF file, a Hugging Face folder, or an id such as org/name or "
        "org/name:file.gguf, as NAME (else by its own name); repeatable "
        f"(default: {DEFAULT_MODEL.name} as {' and '.join(_DEFAULT_NAMES)})",
    )
    add_revision_option(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    command.add_argument("--port", type=_port, default=8000, help="0: any free one (%(default)s)")
    command.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=ServerSettings().drain_timeout_s,
        help="time that running requests have to end after SIGTERM or Ctrl-C, while new ones get "
        "503; a second signal ends the server at once (%(default)g)",
    )
    command.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        help="of the log on the error output; json: one object a line. Prompts, completions and "
        "keys are never logged (%(default)s)",
    )
    command.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="info",
        help="debug: health probes too; warning: no requests (%(default)s)",
    )
    keys = command.add_argument_group("authentication")
    keys.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help="accept this key too; repeatable. Other users of the machine can see it: "
        "better set RAPSHEE_API_KEY or use a file",
    )
    keys.add_argument("--api-key-file", metavar="FILE", help="accept the keys in FILE, one a line")
    keys.add_argument(
        "--no-auth", action="store_true", help="need no key; only with a loopback --host"
    )
    add_engine_options(command)


def _serve(options: argparse.Namespace) -> None:
    configure_logging(options.log_format, options.log_level)
    given_keys, hint = _given_keys(options, os.environ)
    launch(
        LaunchOptions(
            models=_models(options.model, options.revision),
            engine_options=engine_options(options),
            host=options.host,
            port=options.port,
            home=home_folder(os.environ),
            given_keys=given_keys,
            given_key_hint=hint,
            authenticate=not options.no_auth,
            settings=ServerSettings(drain_timeout_s=options.drain_timeout),
        )
    )


def _named_model(text: str) -> tuple[str, str]:
    """Name and path or id."""
    name, separator, model = text.partition("=")
    if not separator:
        name, model = _own_name(text), text
    if not model or not name.isprintable() or not name or " " in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL with a name without blanks")
    return name, model


def _own_name(model: str) -> str:
    """The name that a model goes by: its id, or its file's or folder's name."""
    if os.path.exists(model):
        return Path(os.path.abspath(model)).name.removesuffix(".gguf")
    return model.partition(":")[0]


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, such as 30 or 0.5")
    return float(text)


def _models(given: Sequence[tuple[str, str]], revision: str | None) -> dict[str, str]:
    """Served name -> absolute path; ids are downloaded.

    Raises:
        ConfigError: a name comes twice, or nothing lies at a path.
        DownloadError: an id's model cannot be had.
    """
    if not given:
        return dict.fromkeys(_DEFAULT_NAMES, find_model(None, revision))
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--model {name} is given twice; give every model its own name")
    return {name: find_model(model, revision) for name, model in given}


def _given_keys(
    options: argparse.Namespace, environ: Mapping[str, str]
) -> tuple[tuple[str, ...], str]:
    """The keys that the operator chose, and how a shell gets one of them.

    Raises:
        ConfigError: a key cannot be sent in a header, or the file cannot be read.
    """
    keys = []
    hint = ""
    if environ.get("RAPSHEE_API_KEY"):
        hint = "$RAPSHEE_API_KEY"
        keys.append(check_key_text(environ["RAPSHEE_API_KEY"], source="RAPSHEE_API_KEY"))
    if options.api_key_file is not None:
        hint = hint or f"$(grep -m1 '^[^#]' {shlex.quote(options.api_key_file)})"
        keys += _keys_in_file(options.api_key_file)
    for key in options.api_key:
        hint = hint or "YOUR_KEY"
        keys.append(check_key_text(key, source="--api-key"))
    if keys and options.no_auth:
        raise ConfigError("--no-auth takes no keys: remove it, or the keys")
    return tuple(keys), hint


def _keys_in_file(name: str) -> list[str]:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --api-key-file {name}: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {name} holds no key; write one a line")
    return [check_key_text(key, source=f"--api-key-file {name}") for key in keys]
