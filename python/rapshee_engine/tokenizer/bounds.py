"""Limits on what one rendering of a chat template may make and do."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from contextvars import ContextVar
from types import TracebackType

from jinja2 import TemplateError

__all__ = [
    "MAX_OUTPUT_BYTES",
    "MAX_RANGE",
    "MAX_TEXT",
    "MAX_WIDTH",
    "STEP_COST",
    "RenderBudget",
    "pass_over",
    "require_number",
    "require_size",
    "text_size",
]

MAX_OUTPUT_BYTES = 4 << 20
MAX_TEXT = 4 << 20  # characters of any string, items of any list, made on the way
MAX_RANGE = 10_000
MAX_WIDTH = 999  # of padding, an indentation, a number in a format

# A loop step, a filter or a call takes 1 to 6 us of interpreter time, copying a character at most
# 1 ns. At these prices the whole budget, 262,144 steps, is worth a second or two.
STEP_COST = 1024
_ITEM_COST = 32  # comparing or sorting one item of a list
_MAX_WORK = 1 << 28


class RenderBudget:
    """The work that one rendering may still do; a context manager around that rendering."""

    _current: ContextVar[RenderBudget] = ContextVar("render_budget")

    def __init__(self) -> None:
        self._left = _MAX_WORK

    def __enter__(self) -> None:
        self._token = self._current.set(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._current.reset(self._token)

    @classmethod
    def spend(cls, work: int) -> None:
        """Take ``work`` off the budget of the rendering in progress.

        Raises:
            TemplateError: nothing is left.
        """
        budget = cls._current.get()
        budget._left -= work
        if budget._left < 0:
            raise TemplateError("it takes too many steps")


def pass_over(value: object) -> None:
    """Pay for one pass over ``value``.

    Raises:
        TemplateError: the budget is spent.
    """
    if isinstance(value, Sized):
        RenderBudget.spend(len(value) * (1 if isinstance(value, str) else _ITEM_COST))


def require_size(size: int) -> None:
    """Pay for a value of ``size`` characters or items.

    Raises:
        TemplateError: it is too large, or the budget is spent.
    """
    if size > MAX_TEXT:
        raise TemplateError(f"a value would be larger than {MAX_TEXT} characters or items")
    RenderBudget.spend(size)


def require_number(number: object, most: int = MAX_WIDTH) -> None:
    """Raise `TemplateError` if ``number`` is an integer beyond ``most`` in either direction."""
    if isinstance(number, int) and abs(number) > most:
        raise TemplateError(f"a width or precision must be at most {most}, got {number}")


def text_size(value: object) -> int:
    """Characters that ``value`` has as text, about; counting stops beyond the largest allowed."""
    size = 0
    waiting = [value]
    while waiting and size <= MAX_TEXT:
        value = waiting.pop()
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.keys())
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, range)):
            waiting.extend(value)
        size += 1
    return size
