"""``rapshee-engine pull``."""

from __future__ import annotations

import argparse
from typing import Any

from rapshee_engine.cli.common import add_command
from rapshee_engine.cli.models import cache
from rapshee_engine.pull import DEFAULT_MODEL, pull

__all__ = ["add"]


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "pull",
        _pull,
        f"download the default model, {DEFAULT_MODEL.name}",
        "The file goes to models/ in $RAPSHEE_CACHE (~/.cache/rapshee-engine), and its path to\n"
        "standard output. A model that is there already is not downloaded again.",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="check the SHA-256 of a model that is there already, and replace it if it is wrong",
    )


def _pull(options: argparse.Namespace) -> None:
    print(pull(DEFAULT_MODEL, cache(), verify=options.verify))
