"""``rapshee-engine chat``."""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
import textwrap
from collections.abc import Iterator
from contextlib import aclosing, closing
from typing import Any

from rapshee_engine.cli.common import add_command
from rapshee_engine.cli.engine_options import add_engine_options, engine_options
from rapshee_engine.cli.models import add_model_option, find_model
from rapshee_engine.cli.sampling_options import add_sampling_options, sampling_params
from rapshee_engine.engine.async_engine import AsyncEngine
from rapshee_engine.errors import ConfigError, InvalidRequestError
from rapshee_engine.sampling_params import SamplingParams

try:  # gives input() line editing and history; some builds of Python are without it
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

__all__ = ["add"]

_PROMPT = "> "
_QUOTE = '"""'
_HELP = f"""\
/system TEXT  set the system message; without a text: none
/reset        forget the conversation, not the system message
/exit         end, as Ctrl-D does
/help         show this
Ctrl-C stops an answer; what was said of it stays in the conversation.
A message of several lines stands between {_QUOTE} and {_QUOTE}, or is pasted.
A message that begins with / needs a space before it."""


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "chat",
        _chat,
        "talk with a model in the terminal",
        "in the conversation:\n" + textwrap.indent(_HELP, "  "),
    )
    add_model_option(command)
    command.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_options(command, max_tokens=None)
    add_engine_options(command)


def _chat(options: argparse.Namespace) -> None:
    params = sampling_params(options)
    path = find_model(options.model, options.revision)
    with closing(AsyncEngine(model=path, **engine_options(options))) as engine:
        if engine.chat_template is None:
            raise ConfigError(
                f"{path} has no chat template; give one with --chat-template, or use "
                "`rapshee-engine generate --raw`"
            )
        chat = _Chat(engine, params, options.system)
        _prepare_input()
        for message in _messages():
            if not chat.handle(message):
                break


# ---- reading


def _prepare_input() -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("/help shows what you can do besides talking.")
        if readline is not None:
            readline.parse_and_bind("set enable-bracketed-paste on")


def _messages() -> Iterator[str]:
    """What the user says, message by message."""
    while (line := _read_line(_PROMPT)) is not None:
        if not line.startswith(_QUOTE):
            yield line
            continue
        lines = [line.removeprefix(_QUOTE)]
        while not lines[-1].endswith(_QUOTE) and (line := _read_line("")) is not None:
            lines.append(line)
        yield "\n".join(lines).removesuffix(_QUOTE).strip("\n")


def _read_line(prompt: str) -> str | None:
    """A line, which holds line breaks where it was pasted so; None at the end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    while True:
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit ends.")


# ---- answering


class _Chat:
    """A conversation and the engine that takes part in it."""

    def __init__(self, engine: AsyncEngine, params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._system = system
        self._turns: list[dict[str, str]] = []

    def handle(self, message: str) -> bool:
        """Answer a message or obey a command; whether to go on."""
        name, _, argument = message.strip().partition(" ")
        if not message.strip():
            return True
        if not message.startswith("/"):
            self._answer(message.strip())
        elif name == "/exit":
            return False
        elif name == "/reset":
            self._turns.clear()
        elif name == "/system":
            self._system = argument.strip() or None
        elif name == "/help":
            print(_HELP)
        else:
            print(f"There is no command {_printable(name)}; /help lists them.")
        return True

    def _answer(self, message: str) -> None:
        """Print the answer as it comes; keep it, or as much as was said before Ctrl-C."""
        self._turns.append({"role": "user", "content": message})
        said: list[str] = []
        try:
            asyncio.run(self._stream(said))
            print(flush=True)
        except KeyboardInterrupt:
            print("\n[stopped]", flush=True)
        except InvalidRequestError as error:
            print(f"{error} (/reset begins anew)", file=sys.stderr)
        if said:
            self._turns.append({"role": "assistant", "content": "".join(said)})
        else:  # nothing was said: the conversation goes on as if nothing had been asked
            self._turns.pop()

    async def _stream(self, said: list[str]) -> None:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        token_ids = self._engine.render_chat([*system, *self._turns])
        prompt = {"prompt_token_ids": token_ids, "is_chat": True}
        async with aclosing(self._engine.generate(prompt, self._params)) as outputs:
            async for output in outputs:
                text = output.outputs[0].text
                if text:
                    said.append(text)
                    print(_printable(text), end="", flush=True)


def _printable(text: str) -> str:
    """``text`` without control characters, which a terminal would obey."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
