"""``rapshee-engine pull``."""

from __future__ import annotations

import argparse
from typing import Any

from rapshee_engine.cli.common import add_command
from rapshee_engine.cli.models import add_revision_option, cache, pull_from_hub
from rapshee_engine.errors import ConfigError
from rapshee_engine.pull import DEFAULT_MODEL, pull

__all__ = ["add"]


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "pull",
        _pull,
        f"download a model: one of the Hugging Face hub, or {DEFAULT_MODEL.name}",
        "examples:\n"
        "  rapshee-engine pull\n"
        "  rapshee-engine pull Qwen/Qwen3-0.6B\n"
        "  rapshee-engine pull Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf\n\n"
        "The model goes to $RAPSHEE_CACHE (~/.cache/rapshee-engine), and its path to standard\n"
        "output. Checksums are verified, an interrupted download goes on where it stopped, and\n"
        "what is there already is not downloaded again. HF_TOKEN opens private and restricted\n"
        "models, HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 asks none.",
    )
    command.add_argument(
        "model", nargs="?", metavar="ID", help="org/name, or org/name:file.gguf for one file of it"
    )
    add_revision_option(command)
    command.add_argument(
        "--include",
        metavar="PATTERN",
        action="append",
        default=[],
        help="take the files that match, such as '*.json'; repeatable (default: what the engine "
        "needs)",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="check the SHA-256 of the default model where it is there already, and replace it if "
        "it is wrong",
    )


def _pull(options: argparse.Namespace) -> None:
    if options.model is None:
        if options.revision is not None or options.include:
            raise ConfigError("--revision and --include need the id of a model")
        print(pull(DEFAULT_MODEL, cache(), verify=options.verify))
        return
    if options.verify:
        raise ConfigError("--verify is for the default model; others are verified as they come")
    print(pull_from_hub(options.model, options.revision, options.include))
