"""``rapshee-engine generate``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import aclosing, closing
from typing import Any

from rapshee_engine.cli.common import add_command
from rapshee_engine.cli.engine_options import add_engine_options, engine_options
from rapshee_engine.cli.models import add_model_option, find_model
from rapshee_engine.cli.sampling_options import add_sampling_options, sampling_params
from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.errors import ConfigError
from rapshee_engine.sampling_params import SamplingParams

__all__ = ["add"]


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "generate",
        _generate,
        "answer one prompt on standard output",
        "examples:\n"
        '  rapshee-engine generate "Why is the sky blue?"\n'
        "  echo 'Once upon a time' | rapshee-engine generate --raw --max-tokens 100\n",
    )
    command.add_argument("prompt", nargs="?", help="the text (default: standard input)")
    add_model_option(command)
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--chat",
        action="store_true",
        default=None,
        dest="chat",
        help="as a user's message (default where the model has a chat template)",
    )
    form.add_argument(
        "--raw", action="store_false", dest="chat", help="as text to continue, control tokens too"
    )
    add_sampling_options(command, max_tokens=512)
    add_engine_options(command)


def _generate(options: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    if not prompt.strip():
        raise ConfigError("the prompt is empty; give it as an argument or on standard input")
    params = sampling_params(options)
    path = find_model(options.model, options.revision)
    with closing(AsyncEngine(model=path, **engine_options(options))) as engine:
        chat = engine.chat_template is not None if options.chat is None else options.chat
        asyncio.run(_print_completion(engine, prompt, params, chat=chat))


async def _print_completion(
    engine: AsyncEngine, prompt: str, params: SamplingParams, *, chat: bool
) -> None:
    # Only a raw prompt is one that may hold control tokens.
    asked: Any = prompt
    if chat:
        token_ids = engine.render_chat([{"role": "user", "content": prompt}])
        asked = {"prompt_token_ids": token_ids, "is_chat": True}
    async with aclosing(engine.generate(asked, params)) as outputs:
        async for output in outputs:
            print(output.outputs[0].text, end="", flush=True)
    print()
