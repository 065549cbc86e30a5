"""A conversation in a terminal, with a model that never ends by itself."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reference.tiny_chat import write_chat_folder

# In a new session the first terminal that is opened is the one that Ctrl-C comes from.
PROGRAM = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
os.close(os.open(os.ttyname(0), os.O_RDWR))
from rapshee_engine.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A terminal in which the chat runs."""

    def __init__(self, *arguments: str) -> None:
        self._terminal, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "chat", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(inner)

    def read_until(self, end: bytes) -> None:
        seen = b""
        while end not in seen:
            assert self._has_output(60), seen
            seen += os.read(self._terminal, 1)

    def press_until(self, key: bytes, end: bytes) -> None:
        """Press a key, and again while nothing comes of it: between its last look for signals and
        its wait for keys, Python's input() does not notice one."""
        seen = b""
        for _ in range(60):
            self.type(key)
            while self._has_output(1):
                seen += os.read(self._terminal, 1)
                if end in seen:
                    return
        raise AssertionError(seen)

    def wait_for_an_answer(self) -> None:
        """More than what a terminal is told when a line ends."""
        for _ in range(32):
            assert self._has_output(60)
            os.read(self._terminal, 1)

    def _has_output(self, seconds: float) -> bool:
        return bool(select.select([self._terminal], [], [], seconds)[0])

    def read_to_the_end(self) -> bytes:
        seen = b""
        try:
            while piece := os.read(self._terminal, 4096):
                seen += piece
        except OSError:  # how a terminal says that its last user has left
            pass
        return seen

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    model = write_chat_folder(tmp_path / "model", max_position_embeddings=1 << 20)
    options = "--device cpu --temperature 0 --kv-cache-memory 1G --threads 1"
    terminal = Terminal("--model", str(model), *options.split())
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends(terminal: Terminal) -> None:
    terminal.read_until(b"> ")
    for _ in range(2):
        terminal.type(b"hello\n")
        terminal.read_until(b"hello\r\n")
        terminal.wait_for_an_answer()
        terminal.type(b"\x03")
        terminal.read_until(b"[stopped]")
        terminal.read_until(b"> ")
        terminal.type(b"/reset\n")  # what the model says next depends on when it was stopped
        terminal.read_until(b"/reset\r\n")
        terminal.read_until(b"> ")
    terminal.press_until(b"\x03", b"Ctrl-D or /exit ends.")
    terminal.read_until(b"> ")
    terminal.type(b"/hel\t\x7fp\n")  # a typed line can be edited
    terminal.read_until(b"/reset")
    terminal.read_until(b"> ")
    terminal.type(b"\x04")
    terminal.read_to_the_end()
    assert terminal.process.wait(60) == 0


def test_a_pasted_text_is_one_message(terminal: Terminal) -> None:
    terminal.read_until(b"> ")
    terminal.type(b"\x1b[200~/exit\nnot yet\x1b[201~\n")
    terminal.read_until(b"There is no command /exit")
    terminal.read_until(b"> ")
    terminal.type(b"/exit\n")
    terminal.read_to_the_end()
    assert terminal.process.wait(60) == 0


def test_sigint_from_elsewhere_stops_the_answer_too(terminal: Terminal) -> None:
    terminal.read_until(b"> ")
    terminal.type(b"hello\n")
    terminal.read_until(b"hello\r\n")
    terminal.wait_for_an_answer()
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until(b"[stopped]")
    terminal.read_until(b"> ")
    terminal.type(b"/exit\n")
    terminal.read_to_the_end()
    assert terminal.process.wait(60) == 0
