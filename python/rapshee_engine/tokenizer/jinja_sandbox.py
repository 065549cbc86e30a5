"""A Jinja environment for chat templates whose rendering is bounded in output, memory and work.

For the templates that people write it gives what the environment of `transformers` gives
(``utils/chat_template_utils.py``, ``_compile_jinja_template``).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from functools import wraps
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.visitor import NodeTransformer

from rapshee_engine.tokenizer.bounds import (
    MAX_RANGE,
    STEP_COST,
    RenderBudget,
    pass_over,
    require_size,
    text_size,
)
from rapshee_engine.tokenizer.value_checks import (
    FILTER_CHECKS,
    STR_METHOD_CHECKS,
    check_format,
    check_power,
    check_product,
    check_remainder,
    check_sum,
    check_time_format,
)

__all__ = ["ChatEnvironment"]

# Filters that grow a value by a number, draw at random, or make HTML. A template that uses one is
# refused when it is compiled.
_REMOVED_FILTERS = frozenset(
    {
        "batch",
        "center",
        "filesizeformat",
        "forceescape",
        "pprint",
        "random",
        "slice",
        "urlencode",
        "urlize",
        "wordwrap",
        "xmlattr",
    }
)
_STEPS = "_steps"
_PASS = "_pass"


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment in which chat templates are compiled. Use it inside a `RenderBudget`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, LoopControlExtension],
            finalize=_printable,
        )
        self.concat = _concat  # type: ignore[method-assign]
        self.binop_table |= {
            "+": _checked(check_sum, operator.add),
            "*": _checked(check_product, operator.mul),
            "**": _checked(check_power, operator.pow),
            "%": _checked(check_remainder, operator.mod),
        }
        filters = {**FILTERS, "tojson": _tojson, _STEPS: _steps, _PASS: _pass}
        self.filters = {
            name: _metered(name, function)
            for name, function in filters.items()
            if name not in _REMOVED_FILTERS
        }
        tests = cast("dict[str, Callable[..., Any]]", TESTS)
        self.tests = {name: _metered_test(function) for name, function in tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "range": _range,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Meter().visit(source), *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        pattern: str = value.__self__

        @wraps(formatted)
        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(pattern, (args, kwargs))
            return formatted(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        RenderBudget.spend(STEP_COST)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            pass_over(owner)
            check = STR_METHOD_CHECKS.get(__obj.__name__)
            if check is not None:
                check(owner, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


class _GenerationTag(Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; here it is just text."""

    tags = {"generation"}  # noqa: RUF012  (declared mutable by the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Meter(NodeTransformer):
    """Routes loops, comparisons, slices and ``~`` through filters, which are metered."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(cast("nodes.Expr", node.iter), _STEPS)
        return node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, _PASS)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, _PASS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "join")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _checked(
    check: Callable[[Any, Any], None], operation: Callable[[Any, Any], Any]
) -> Callable[[Any, Any], Any]:
    def checked(left: Any, right: Any) -> Any:
        check(left, right)
        return operation(left, right)

    return checked


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose input and output are checked and paid for."""
    takes_context = hasattr(function, "jinja_pass_arg")
    check = FILTER_CHECKS.get(name)

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if takes_context else args
        RenderBudget.spend(STEP_COST)
        pass_over(given[0])
        if check is not None:
            check(*given, **kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, (str, list)):
            require_size(len(result))
        return result

    return metered


def _metered_test(function: Callable[..., Any]) -> Callable[..., Any]:
    """A test, such as ``in`` or ``eq``, whose operands are paid for."""

    @wraps(function)
    def metered(*args: Any) -> Any:
        RenderBudget.spend(STEP_COST)
        for operand in args:
            pass_over(operand)
        return function(*args)

    return metered


def _pass(value: Any) -> Any:
    """An operand that is about to be compared or copied."""
    return value


def _steps(values: Iterable[Any]) -> Iterable[Any]:
    """The values of a loop, each paid for; sized ones stay sized, as ``loop.length`` wants."""
    if isinstance(values, Sized):
        RenderBudget.spend(STEP_COST * len(values))
        return values
    return _paid(values)


def _paid(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        RenderBudget.spend(STEP_COST)
        yield value


def _printable(value: Any) -> Any:
    """A value about to be printed; a list may be small and its text large."""
    if not isinstance(value, str):
        require_size(text_size(value))
    return value


def _concat(parts: Iterable[str]) -> str:
    """Joins what a block or a macro printed."""
    parts = list(parts)
    require_size(sum(map(len, parts)))
    return "".join(parts)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; the built-in filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise TemplateError(f"a range is longer than {MAX_RANGE}")
    return numbers


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    check_time_format(pattern)
    return datetime.now().strftime(pattern)
