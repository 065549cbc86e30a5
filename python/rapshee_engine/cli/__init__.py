"""The command ``rapshee-engine``, one module a sub-command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rapshee_engine.cli import chat, generate, info, inspect, pull, serve
from rapshee_engine.engine.runner import build_info
from rapshee_engine.errors import RapsheeError

__all__ = ["main"]

_COMMANDS = (serve, chat, generate, pull, inspect, info)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0, 1 for an error, 2 for wrong usage, 130 if interrupted."""
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except RapsheeError as error:
        print(f"rapshee-engine: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rapshee-engine",
        description="Serve language models over an OpenAI-compatible API, or run them here.",
    )
    version = f"%(prog)s {build_info()['version']}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
