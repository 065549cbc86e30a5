"""``chat``, reading from what is no terminal; ``tests/end_to_end/test_chat.py`` has one."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest

from rapshee_engine import cli
from rapshee_engine.cli import chat
from rapshee_engine.errors import InvalidRequestError
from rapshee_engine.sampling_params import RequestOutputKind, SamplingParams

Talk = Callable[..., str]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


HELLO = {"role": "assistant", "content": "Hello there"}


@pytest.fixture
def talk(
    engines: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Says lines to a model, and returns what is printed."""

    def say(*lines: str, arguments: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert cli.main(["chat", *arguments]) == 0
        assert all(engine.closed for engine in engines)
        return capsys.readouterr().out

    return say


def test_the_conversation_is_remembered(talk: Talk, engines: list[Any]) -> None:
    assert talk("hi", "", " and you? ") == "Hello there\nHello there\n"
    assert engines[0].conversations == [[user("hi")], [user("hi"), HELLO, user("and you?")]]


def test_options_are_passed_on(talk: Talk, engines: list[Any], model: str) -> None:
    arguments = f"""--model {model} --system Rhyme. --max-tokens 5 --temperature 0.5 --top-p 0.9
        --top-k 7 --min-p 0.1 --seed 3 --threads 1"""
    talk("hi", arguments=tuple(arguments.split()))
    (engine,) = engines
    assert (engine.config.model, engine.config.threads) == (model, 1)
    assert engine.conversations == [[system("Rhyme."), user("hi")]]
    assert engine.asked[0][1] == SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        output_kind=RequestOutputKind.DELTA,
    )


def test_an_answer_may_be_as_long_as_the_context(talk: Talk, engines: list[Any]) -> None:
    talk("hi")
    assert engines[0].asked[0][1].max_tokens is None


def test_reset_forgets_the_conversation_alone(talk: Talk, engines: list[Any]) -> None:
    talk("/system Rhyme.", "one", "/reset", "two", "/system", "three")
    assert engines[0].conversations == [
        [system("Rhyme."), user("one")],
        [system("Rhyme."), user("two")],
        [user("two"), HELLO, user("three")],
    ]


def test_exit_ends_it(talk: Talk, engines: list[Any]) -> None:
    assert talk("/exit", "hi") == ""
    assert engines[0].conversations == []


def test_other_commands(talk: Talk, engines: list[Any]) -> None:
    shown = talk("/help", "/sing loud", " /etc is what?")
    assert "/reset" in shown
    assert "There is no command /sing" in shown
    assert engines[0].conversations == [[user("/etc is what?")]]


def test_a_message_of_several_lines(talk: Talk, engines: list[Any]) -> None:
    talk('"""one', "", "/two", 'three"""', '"""', "four", '"""', '"""five')
    asked = [conversation[-1]["content"] for conversation in engines[0].conversations]
    assert asked == ["one\n\n/two\nthree", "four", "five"]


def test_what_was_said_before_an_interruption_stays(
    talk: Talk, engines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat.AsyncEngine, "pieces", ("Hel", None, "lo"))
    assert talk("one", "two") == "Hel\n[stopped]\nHel\n[stopped]\n"
    said = {"role": "assistant", "content": "Hel"}
    assert engines[0].conversations[1] == [user("one"), said, user("two")]


def test_an_answer_that_never_began_was_not_asked_for(
    talk: Talk, engines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat.AsyncEngine, "pieces", (None,))
    talk("one", "two")
    assert engines[0].conversations == [[user("one")], [user("two")]]


def test_a_refusal_does_not_end_the_conversation(
    talk: Talk, engines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    render = chat.AsyncEngine.render_chat

    def refuse_long(self: Any, messages: Any) -> list[int]:
        if len(messages[-1]["content"]) > 9:
            raise InvalidRequestError("too long")
        return render(self, messages)

    monkeypatch.setattr(chat.AsyncEngine, "render_chat", refuse_long)
    assert talk("one", "a long message", "two") == "Hello there\nHello there\n"
    assert engines[0].conversations[1] == [user("one"), HELLO, user("two")]


def test_a_model_cannot_command_the_terminal(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.AsyncEngine, "pieces", ("a\x1b[2J\x07b\n\tc\u202e",))
    assert talk("hi") == "a[2Jb\n\tc\n"


def test_without_a_template_there_is_no_chat(
    error_line: Callable[..., str], engines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = chat.AsyncEngine

    def make(model: str, **options: Any) -> Any:
        engine: Any = fake(model, **options)
        engine.chat_template = None
        return engine

    monkeypatch.setattr(chat, "AsyncEngine", make)
    assert "has no chat template" in error_line("chat")
    assert engines[0].closed


def test_wrong_options_load_no_model(error_line: Callable[..., str], engines: list[Any]) -> None:
    assert "top_p" in error_line("chat", "--top-p", "2")
    assert engines == []
