"""Checks, before they run, of the template operations that could give far more than they take.

Each check has the signature of the operation that it guards, and raises `TemplateError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sized
from string import Formatter
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from rapshee_engine.tokenizer.bounds import require_number, require_size, text_size

__all__ = [
    "FILTER_CHECKS",
    "STR_METHOD_CHECKS",
    "check_format",
    "check_power",
    "check_product",
    "check_remainder",
    "check_sum",
    "check_time_format",
]

_MAX_INT_BITS = 1024
_MAX_JSON_INDENT = 16

# ``*`` takes the width from an argument; four digits are beyond any width that a prompt needs.
_WIDE_FIELD = re.compile(r"\*|\d{4,}")
_PERCENT_FIELD = re.compile(r"%[^a-zA-Z%]*")


def check_sum(left: Any, right: Any) -> None:
    if isinstance(left, Sized) and isinstance(right, Sized):
        require_size(len(left) + len(right))


def check_product(left: Any, right: Any) -> None:
    for sized, count in ((left, right), (right, left)):
        if isinstance(sized, Sized) and isinstance(count, int):
            require_size(len(sized) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())


def check_power(base: Any, exponent: Any) -> None:
    if not isinstance(base, (int, float)) or not isinstance(exponent, (int, float)):
        raise TemplateError("** takes numbers")
    if isinstance(base, int) and isinstance(exponent, int):
        _require_bits(base.bit_length() * max(exponent, 1))


def _require_bits(bits: int) -> None:
    if bits > _MAX_INT_BITS:
        raise TemplateError(f"an integer would be larger than {_MAX_INT_BITS} bits")


def check_remainder(left: Any, right: Any) -> None:
    """``%`` of a string formats it."""
    if isinstance(left, str):
        _check_fields(left, _PERCENT_FIELD.findall(left), right)


def check_format(pattern: str, arguments: Any) -> None:
    """``str.format``; a field inside a field's format would choose the width."""
    specs = [spec or "" for _, name, spec, _ in Formatter().parse(pattern) if name is not None]
    if any("{" in spec for spec in specs):
        raise TemplateError("a format has a width that is not fixed")
    _check_fields(pattern, specs, arguments)


def check_time_format(pattern: str) -> None:
    _check_fields(pattern, _PERCENT_FIELD.findall(pattern), None)


def _check_fields(pattern: str, specs: list[str], arguments: Any) -> None:
    if any(_WIDE_FIELD.search(spec) for spec in specs):
        raise TemplateError("a format has a width that is too large or not fixed")
    require_size(len(pattern) + len(specs) * text_size(arguments))


def _check_printed(value: Any) -> None:
    require_size(text_size(value))


def _check_format_filter(value: Any, *args: Any, **kwargs: Any) -> None:
    check_remainder(str(value), (args, kwargs))


def _check_indent(s: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    require_number(width)
    each = len(width) if isinstance(width, str) else width
    require_size(len(s) + (len(s.splitlines()) + 1) * each)


def _check_join(value: Any, d: Any = "", *_: Any, **__: Any) -> None:
    if isinstance(value, Sized):
        require_size(text_size(value) + len(value) * text_size(d))


def _check_replace(s: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    text = str(s)
    require_size(len(text) + text.count(str(old)) * text_size(new))


def _check_round(_: Any, precision: Any = 0, *__: Any, **___: Any) -> None:
    require_number(precision, 100)


def _check_sum_filter(_: Any, __: Any = None, start: Any = 0) -> None:
    # Lists and strings would be copied once an item.
    if not isinstance(start, (int, float)):
        raise TemplateError("sum takes numbers")


def _check_tojson(value: Any, *args: Any, **options: Any) -> None:
    for option in (*args, *options.values()):
        require_number(option, _MAX_JSON_INDENT)
    require_size(text_size(value))


FILTER_CHECKS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        "e": _check_printed,
        "escape": _check_printed,
        "format": _check_format_filter,
        "indent": _check_indent,
        "join": _check_join,
        "replace": _check_replace,
        "round": _check_round,
        "string": _check_printed,
        "sum": _check_sum_filter,
        "tojson": _check_tojson,
    }
)


def _check_padding(owner: str, width: Any, *_: Any) -> None:
    require_number(width)
    require_size(len(owner))


def _check_expandtabs(owner: str, tabsize: Any = 8) -> None:
    require_number(tabsize)
    require_size(len(owner) + owner.count("\t") * tabsize)


def _check_str_join(owner: str, items: Iterable[Any]) -> None:
    _check_join(items, owner)


def _check_translate(*_: Any) -> None:
    raise TemplateError("str.translate is not available")


STR_METHOD_CHECKS: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        "center": _check_padding,
        "expandtabs": _check_expandtabs,
        "join": _check_str_join,
        "ljust": _check_padding,
        "replace": _check_replace,
        "rjust": _check_padding,
        "translate": _check_translate,
        "zfill": _check_padding,
    }
)
