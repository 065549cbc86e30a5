"""Finds the first of several strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Passes text through up to the first stop string.

    First is the one completed first; of several completed by the same character, the longest. So
    the outcome depends on the text alone, not on the pieces it came in.

    Each string is followed by its Knuth-Morris-Pratt automaton: a character costs amortised
    constant time a string, whatever the strings are.

    Attributes:
        matched: the string that was found; nothing is passed after it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        # Longest first, so that the first match at a character is the longest one.
        ordered = sorted(set(strings), key=len, reverse=True)
        self._automata = [(string, _borders(string)) for string in ordered]
        self._states = [0] * len(ordered)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that cannot be part of a stop string any more, in order."""
        for index, char in enumerate(text):
            matched = self._advance(char)
            if matched is not None:
                self.matched = matched
                passed = self._held + text[: index + 1]
                self._held = ""
                return passed[: len(passed) - len(matched)]
        passed = self._held + text
        keep = len(passed) - max(self._states)
        self._held = passed[keep:]
        return passed[:keep]

    def flush(self) -> str:
        """The text held back as the possible start of a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Move all automata over one character; the longest string that it completes, if any."""
        for which, (string, borders) in enumerate(self._automata):
            state = self._states[which]
            while state and string[state] != char:
                state = borders[state - 1]
            state += string[state] == char
            if state == len(string):
                return string
            self._states[which] = state
        return None


def _borders(string: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(string)
    size = 0
    for index in range(1, len(string)):
        while size and string[index] != string[size]:
            size = borders[size - 1]
        size += string[index] == string[size]
        borders[index] = size
    return borders
