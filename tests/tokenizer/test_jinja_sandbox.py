"""The environment: what templates may do, and that they cannot do too much of it."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError

from rapshee_engine.tokenizer.bounds import RenderBudget
from rapshee_engine.tokenizer.jinja_sandbox import ChatEnvironment


def render(source: str, **variables: Any) -> str:
    with RenderBudget():
        return ChatEnvironment().from_string(source).render(**variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 2 * 3 }} {{ 2 ** 10 }} {{ 7 % 4 }} {{ 1 + 1 }}", "6 1024 3 2"),
        ("{{ 'ab' * 3 }}{{ [1] * 2 }}", "ababab[1, 1]"),
        ("{{ 'a' ~ 1 ~ none ~ missing }}", "a1None"),
        ("{{ '%s-%5.2f' % ('x', 1.5) }} {{ '%d' | format(3) }}", "x- 1.50 3"),
        ("{{ '{:>4}|{}'.format('a', 1) }}", "   a|1"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for i in [1, 2] %}{{ loop.index }}/{{ loop.length }} {% endfor %}", "1/2 2/2 "),
        ("{% for i in [1, 2] | map('string') %}{{ i }}{{ loop.last }}{% endfor %}", "1False2True"),
        ("{% generation %}a{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}", "a1"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "1"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) }}{{ m('b') }}", "<1><b>"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}", "a1"),
        ("{{ 'a b' | title | replace(' ', '-') | indent(2, true) }}", "  A-B"),
        ("{{ ['b', 'a'] | sort | join(', ') }}", "a, b"),
        ("{{ 2.567 | round(1) }} {{ 'x'.ljust(3) }}|{{ 'a\tb'.expandtabs(2) }}", "2.6 x  |a b"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ 1 < 2 <= 2 }} {{ 'a' in 'ab' }} {{ 3 not in [1] }}", "True True True"),
        ("{{ 'x' in missing }} {{ x is defined }} {{ none is none }}", "False False True"),
        ("{{ 'abc'[1:] }}{{ [1, 2, 3][::-1][0] }}{{ {'a': 1}['a'] }}", "bc31"),
        (
            "{{ [1, 2] | sum }} {{ [1, 2] | select('in', [2]) | list }} {{ 2 is eq 2 }}",
            "3 [2] True",
        ),
    ],
)
def test_ordinary_templates_work(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * [1] }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 'a' ** 2 }}",
        "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}"
        "{% endfor %}",
        "{{ range(10001) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=1000000000) }}",
        "{{ '{0:{1}}'.format(1, 1000000000) }}",
        "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x'.rjust(1000000000) }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ 'x'.zfill(1000000000) }}",
        "{{ '\t'.expandtabs(1000000000) }}",
        "{{ 'x'.translate({120: 'y'}) }}",
        "{{ 'x' | indent(1000000000, true) }}",
        "{{ [[1]] | tojson(indent=1000000000) }}",
        "{{ 1 | round(-1000000000) }}",
        "{{ 1.5 | round(1000000000, 'ceil') }}",
        "{{ strftime_now('%1000000000d') }}",
        "{% set a = 'a' * 4000000 %}{{ a + a }}",
        "{% set a = 'a' * 4000000 %}{{ a ~ a }}",
        "{% set a = 'a' * 4000000 %}{{ [a, a] | join }}",
        "{% set a = 'a' * 4000000 %}{{ ''.join([a, a]) }}",
        "{% set a = 'a' * 3000 %}{{ a.join(range(3000) | map('string') | list) }}",
        "{% set a = 'a' * 3000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 3000 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 4000000 %}{{ '%s%s' % (a, a) }}",
        "{% set a = 'a' * 4000000 %}{{ '{0}{0}'.format(a) }}",
        "{% set a = 'a' * 4000000 %}{{ [a, a] }}",
        "{% set a = 'a' * 4000000 %}{{ [a, a] | string }}",
        "{% set a = 'a' * 4000000 %}{{ [a, a] | tojson }}",
        "{% set a = 'a' * 4000000 %}{% set b %}{{ a }}{{ a }}{% endset %}{{ b }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{{ range(9999) | map('string') | list | length }}{% endfor %}",
        "{% for a in range(9999) %}{% set b = 'a' * 4000000 %}{% endfor %}",
        "{{ lipsum(100000) }}",
        "{{ [[1], [2]] | sum(start=[]) }}",
        "{% set a = [1] * 1000000 %}{% for i in range(999) %}{{ 2 in a }}{% endfor %}",
        "{% set a = [1] * 1000000 %}{% for i in range(999) %}{{ 2 is in a }}{% endfor %}",
        "{% set a = [1] * 1000000 %}{% for i in range(999) %}{{ a | sort | first }}{% endfor %}",
        "{% set a = 'a' * 1000000 %}{% for i in range(999) %}{{ 'b' in a }}{% endfor %}",
        "{% set a = 'a' * 1000000 %}{% for i in range(999) %}{% set b = a[1:] %}{% endfor %}",
        "{% set a = 'a' * 1000000 %}{{ range(9999) | map('string') | select('in', a) | list }}",
    ],
)
def test_growth_without_bounds_is_stopped(source: str) -> None:
    with pytest.raises((TemplateError, RecursionError)):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ (''|attr('format')).__globals__['os'] }}",
        "{{ self.__init__.__globals__['os'] }}",
        "{{ raise_exception.__globals__['datetime'] }}",
        "{{ items.append(1) }}",
        "{{ items.clear() }}",
        "{{ mapping.update({'a': 2}) }}",
        "{% include 'x' %}",
    ],
)
def test_internals_and_changes_are_out_of_reach(source: str) -> None:
    items, mapping = [1], {"a": 1}
    with pytest.raises((TemplateError, TypeError)):
        render(source, items=items, mapping=mapping)
    assert (items, mapping) == ([1], {"a": 1})


def test_budgets_of_renderings_are_separate() -> None:
    source = "{% for a in range(20) %}{% for b in range(10000) %}{% endfor %}{% endfor %}"
    for _ in range(5):
        assert render(source) == ""
