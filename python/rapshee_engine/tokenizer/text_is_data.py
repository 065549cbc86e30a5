"""Keeps control tokens in a caller's text from being control tokens.

A marker, one rare character that occurs in no input, is put on both sides of every character
of the caller's text that could begin or end the string of a control token. So no string of a
control token whose first or last character is the caller's survives in the rendered text, wherever
it lies: inside one value, across several, or across a border with the template's own text; and
whatever the template trims, cuts, joins or changes to another case. The rendered text is then split
at the control tokens that are left, the template's own, and the markers are taken out of the text
between them.

What a template looks for, its own constants, must still be found in the text, so these are left as
they are, except constants that have to do with control tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rapshee_engine.errors import InvalidRequestError
from rapshee_engine.tokenizer.control_tokens import ControlTokens
from rapshee_engine.tokenizer.string_set import StringSet
from rapshee_engine.tokenizer.tokenizer import Tokenizer, reject_lone_surrogates

__all__ = ["TextGuard", "encode_marked"]

# CJK Unified Ideographs Extension B (Unicode 3.1): no white space, no case, nothing to compose,
# and printable, so that ``str`` of a list shows a marker as it is.
_MARKERS = range(0x20000, 0x2A6D7)
_MARKER_DRAWS = 16
_MAX_DEPTH = 64
# Characters of what a template looks for in messages; longer constants are text of its own.
_MAX_CONSTANT = 128


class TextGuard:
    """Marks the text of messages for one vocabulary and one template."""

    def __init__(self, control: ControlTokens, template_constants: Iterable[str]) -> None:
        """Raises `UnsupportedModelError` if a control token is too short to be broken."""
        control.require_breakable()
        self._edges = control.edges
        self._kept = StringSet(
            constant
            for constant in template_constants
            if len(constant) <= _MAX_CONSTANT
            and not self._edges.isdisjoint(constant)
            and not control.touches(constant)
        )

    def mark(self, messages: Sequence[Mapping[str, Any]], template: str) -> tuple[list[Any], str]:
        """A marked copy of the messages, and the marker.

        Raises:
            InvalidRequestError: a value that is no JSON, too deep, or not Unicode; ``param`` is its
                path.
        """
        texts = [template]
        for index, message in enumerate(messages):
            _collect(message, f"messages.{index}", texts)
        marker = _draw_marker(texts)
        table = str.maketrans({char: marker + char + marker for char in self._edges})
        return [self._mark(message, table) for message in messages], marker

    def _mark(self, value: Any, table: Mapping[int, str]) -> Any:
        if isinstance(value, str):
            parts = self._kept.split(value)
            parts[::2] = [part.translate(table) for part in parts[::2]]
            return "".join(parts)
        if isinstance(value, Mapping):
            return {self._mark(k, table): self._mark(v, table) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._mark(item, table) for item in value]
        return value


def _collect(value: Any, path: str, texts: list[str], depth: int = 0) -> None:
    """Add all strings inside ``value`` to ``texts``, after checking them."""
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"nested deeper than {_MAX_DEPTH} levels", param=path)
    if isinstance(value, str):
        reject_lone_surrogates(value, path)
        texts.append(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidRequestError(f"keys must be strings, got {key!r}", param=path)
            _collect(key, path, texts, depth + 1)
            _collect(item, f"{path}.{key}", texts, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _collect(item, f"{path}.{index}", texts, depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise InvalidRequestError(f"must be a JSON value, got {type(value).__name__}", param=path)


def _draw_marker(texts: Sequence[str]) -> str:
    """A random character that none of the texts holds."""
    for _ in range(_MARKER_DRAWS):
        marker = chr(secrets.choice(_MARKERS))
        if not any(marker in text for text in texts):
            return marker
    raise InvalidRequestError(
        "the messages hold too many different rare ideographs", param="messages"
    )


def encode_marked(tokenizer: Tokenizer, rendered: str, marker: str) -> list[int]:
    """Token ids of rendered text, in which only unmarked control tokens are control tokens.

    Raises:
        InvalidRequestError: the vocabulary makes a control token even of plain text.
    """
    control = tokenizer.control
    parts = [part.replace(marker, "") for part in control.split(rendered)]
    wanted = [control.ids[token] for token in parts[1::2]]
    text = "".join(parts)
    # Where the text holds no other control tokens it is encoded in one go, which gives the
    # reference's ids by construction.
    if control.split(text) == parts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if _control_ids(tokenizer, ids) == [i for i in wanted if i != control.unknown_id]:
            return ids
    return _encode_parts(tokenizer, parts)


def _encode_parts(tokenizer: Tokenizer, parts: Sequence[str]) -> list[int]:
    """Encode ``[text, token, text, ..., text]`` with each text as plain text."""
    control = tokenizer.control
    ids: list[int] = []
    for index in range(0, len(parts), 2):
        text = parts[index]
        if index > 0 and control.rstrip(parts[index - 1]):
            text = text.lstrip()
        if index + 1 < len(parts) and control.lstrip(parts[index + 1]):
            text = text.rstrip()
        if index == 0:
            text_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        else:
            text_ids = tokenizer.encode_continuation(text)
        if _control_ids(tokenizer, text_ids):
            raise InvalidRequestError(
                "the messages hold text that this model can only read as control tokens",
                param="messages",
            )
        ids += text_ids
        if index + 1 < len(parts):
            ids.append(control.ids[parts[index + 1]])
    return ids


def _control_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    unknown = tokenizer.control.unknown_id
    return [i for i in ids if tokenizer.is_special(i) and i != unknown]
