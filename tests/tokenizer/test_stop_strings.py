"""Stop strings: found wherever they lie, whatever pieces the text comes in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapshee_engine.tokenizer.stop_strings import StopStrings


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """By definition: the stop string completed first, the longest of equals; where it begins."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text.endswith(stop, 0, end)]
        if complete:
            stop = max(complete, key=len)
            return end - len(stop), stop
    return None


@settings(deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_equals_the_definition(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    finder = StopStrings(stops)
    passed = ""
    for piece in pieces:
        passed += finder.push(piece)
        assert text.startswith(passed)
        if finder.matched is not None:
            break
    found = first_stop(text, stops)
    if found is None:
        assert finder.matched is None
        assert passed + finder.flush() == text
    else:
        assert (passed, finder.matched) == (text[: found[0]], found[1])


@settings(deadline=None)
@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=1, max_size=5))
def test_holds_back_no_more_than_needed(text: str, stop: str) -> None:
    finder = StopStrings([stop])
    passed = finder.push(text)
    if finder.matched is None:
        held = text[len(passed) :]
        assert stop.startswith(held)
        longer = [n for n in range(len(held) + 1, len(stop)) if text.endswith(stop[:n])]
        assert longer == []


@pytest.mark.parametrize(
    ("pieces", "stops", "passed", "matched"),
    [
        (["one stop two"], ["stop"], "one ", "stop"),
        (["one st", "op two"], ["stop"], "one ", "stop"),
        (["sto", "sto", "stop"], ["stop"], "stosto", "stop"),
        (["xabcx"], ["c", "abc"], "x", "abc"),
        (["xabcx"], ["bc", "abcx"], "xa", "bc"),
        (["ab", "cd"], ["cd", "b"], "a", "b"),
        (["aaab"], ["aab"], "a", "aab"),
        (["\n", "\n"], ["\n\n"], "", "\n\n"),
    ],
)
def test_examples(pieces: list[str], stops: list[str], passed: str, matched: str) -> None:
    finder = StopStrings(stops)
    got = ""
    for piece in pieces:
        got += finder.push(piece)
        if finder.matched is not None:
            break
    assert (got, finder.matched) == (passed, matched)


def test_a_long_stop_string_costs_linear_work() -> None:
    size = 20_000
    finder = StopStrings(["a" * size + "b"])
    passed = "".join(finder.push("a") for _ in range(2 * size))
    assert len(passed) == size
    assert finder.push("b") == ""
    assert finder.matched is not None
