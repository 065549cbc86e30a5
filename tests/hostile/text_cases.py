"""Tokenizer files and chat templates of Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hostile.case import CONFIG, Case, Folder, tokenizer_rules
from hostile.folder_cases import edit, folder_case, put
from rapshee_engine.errors import InvalidRequestError, UnsupportedModelError

__all__ = ["text_cases"]

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
Rules = dict[str, Any]


def rules_case(
    name: str,
    attack: Callable[[Rules], Any],
    twin: Callable[[Rules], Any] | None = None,
    **fields: Any,
) -> Case:
    """A case of a ``tokenizer.json``, whose object the functions change."""

    def change(edit_rules: Callable[[Rules], Any]) -> Callable[[Folder], None]:
        def apply(folder: Folder) -> None:
            rules = json.loads(tokenizer_rules())
            edit_rules(rules)
            folder.files[TOKENIZER] = json.dumps(rules)

        return apply

    right = None if twin is None else change(twin)
    return folder_case(name, change(attack), right, TOKENIZER, **{"stage": "tokenizer", **fields})


def token(name: str, token_id: Any) -> Callable[[Rules], Any]:
    """Give a token of the vocabulary another id."""
    return lambda rules: rules["model"]["vocab"].update({name: token_id})


def added(**changes: Any) -> Callable[[Rules], Any]:
    """Add a token that is no part of the model."""
    entry = {
        "id": 510,
        "content": "<added>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return lambda rules: rules["added_tokens"].append({**entry, **changes})


def part(name: str, value: Any) -> Callable[[Rules], Any]:
    return lambda rules: rules.update({name: value})


def replace(pattern: Any, content: str) -> Rules:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: Rules, kind: str = "normalizers") -> Rules:
    return {"type": "Sequence", kind: list(steps)}


def files() -> Iterator[Case]:
    texts: dict[str, str | bytes] = {
        "empty": "",
        "an empty object": "{}",
        "a list": "[]",
        "half": tokenizer_rules()[: len(tokenizer_rules()) // 2],
        "deep": "[" * 10**6,
        "deep model": '{"model":' * 10**5,
        "not UTF-8": b'{"\xff": 1}',
        "a zero byte": tokenizer_rules() + "\0",
        "UTF-16": tokenizer_rules().encode("utf-16"),
        "a mark before it": b"\xef\xbb\xbf" + tokenizer_rules().encode(),
        "a model": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}',
    }
    for label, text in texts.items():
        yield folder_case(label, put(TOKENIZER, text), file=TOKENIZER, stage="tokenizer")


def vocabulary() -> Iterator[Case]:
    for value in (1 << 31, (1 << 32) - 1, 1 << 32, 1 << 64, -1, "3", 1.5, None, [3]):
        yield rules_case(f"a token with the id {value!r}", token("the", value))
    yield rules_case("two tokens with one id", token("nosuch", 3))
    for merges in ([["nosuch", "token"]], ["a"], [["a", "b", "c"]], "ab", [1], [["z", "z"]]):
        yield rules_case(
            f"merges {merges!r}", lambda rules, m=merges: rules["model"].update(merges=m)
        )
    for model in (
        {"type": "GPT9"},
        {"type": "Unigram", "vocab": [], "unk_id": 5},
        {"type": "Unigram", "vocab": [["a", "x"]]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 7},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": "x"},
        [],
        None,
    ):
        yield rules_case(f"model {model!r}", part("model", model))
    for value in (-1, 1 << 32, "510", None):
        yield rules_case(f"an added token with the id {value!r}", added(id=value))
    for content in (None, 5, ["x"]):
        yield rules_case(f"an added token {content!r}", added(content=content))
    for key in ("eos_token", "bos_token"):
        yield folder_case(
            f"{key} outside the model",
            lambda f, k=key: outside_token(f, k),
            lambda f: f.files.update({TOKENIZER: rules_with(added())}),
            file="",
            stage="engine",
        )


def outside_token(f: Folder, key: str) -> None:
    f.files[TOKENIZER] = rules_with(added(id=CONFIG["vocab_size"]))
    f.edit(SETTINGS, **{key: "<added>"})


def rules_with(change: Callable[[Rules], Any]) -> str:
    rules = json.loads(tokenizer_rules())
    change(rules)
    return json.dumps(rules)


def bombs() -> Iterator[Case]:
    """Steps that make a large text of a small one."""
    double = [replace({"String": "a"}, "aa")] * 40
    once = replace({"String": "a"}, "aa")
    fuse: list[Rules] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    prepend = {"type": "Prepend", "prepend": "x"}
    special = {"SpecialToken": {"id": "<nosuch>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    frame = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    attacks = {
        "a text doubled 40 times": ("normalizer", sequence(*double), sequence(once)),
        "a letter that becomes 10^6": (
            "normalizer",
            replace({"String": "a"}, "b" * 10**6),
            once,
        ),
        "every place becomes 10^3 letters": (
            "normalizer",
            replace({"Regex": ""}, "b" * 1000),
            replace({"Regex": "a"}, "b"),
        ),
        "10^6 letters before a text": ("normalizer", prepend | {"prepend": "x" * 10**6}, prepend),
        "steps inside steps": (
            "normalizer",
            sequence(sequence(*double[:20]), sequence(*double[:20])),
            sequence(sequence(once)),
        ),
        "a token doubled 40 times": (
            "decoder",
            sequence(*double, *fuse, kind="decoders"),
            sequence(once, *fuse, kind="decoders"),
        ),
        "a frame without the text": (
            "post_processor",
            frame | {"single": [special]},
            frame | {"single": [text]},
        ),
        "a text 1,000 times": (
            "post_processor",
            frame | {"single": [text] * 1000},
            frame | {"single": [text]},
        ),
    }
    for label, (name, attack, twin) in attacks.items():
        yield rules_case(label, part(name, attack), part(name, twin), error=UnsupportedModelError)


def steps() -> Iterator[Case]:
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        for value in ({"type": "Nonsense"}, {"type": "Sequence"}, [], 5, {}):
            yield rules_case(f"{name} {value!r}", part(name, value))
    yield rules_case("no decoder", part("decoder", None), error=UnsupportedModelError)
    yield rules_case(
        "an unknown decoder",
        part("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        error=UnsupportedModelError,
    )
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    for pattern in ("(", "[", "a{100000}{100000}", "(" * 10**5, "\\p{Nonsense}"):
        yield rules_case(
            f"expression {pattern!r:.30}",
            part("pre_tokenizer", {**split, "pattern": {"Regex": pattern}}),
            part("pre_tokenizer", {**split, "pattern": {"Regex": "a+"}}),
        )


def settings() -> Iterator[Case]:
    for file in (SETTINGS, "special_tokens_map.json"):
        texts: dict[str, str | bytes] = {
            "empty": "",
            "a list": "[]",
            "deep": '{"a":' * 10**5,
            "a key twice": '{"a": 1, "a": 1}',
            "not UTF-8": b'{"a": "\xff"}',
            "a lone surrogate": '{"eos_token": "\\ud800"}',
            "a number of 10^5 digits": '{"a": ' + "1" * 10**5 + "}",
        }
        for label, text in texts.items():
            yield folder_case(label, put(file, text), file=file, stage="tokenizer")
        for key in ("eos_token", "bos_token"):
            for value in (5, [], {"content": 5}, {}, True):
                yield folder_case(
                    f"{key} {value!r}",
                    lambda f, n=file, k=key, v=value: named(f, n, k, v),
                    lambda f, n=file, k=key: named(f, n, k, {"content": "<|im_end|>"}),
                    file=file,
                    stage="tokenizer",
                )
    for value in ("<|im_end|>", 5, {"a": "b"}, [5], [["x"]]):
        yield folder_case(
            f"additional_special_tokens {value!r}",
            edit(SETTINGS, additional_special_tokens=value),
            edit(SETTINGS, additional_special_tokens=["<|im_end|>"]),
            file=SETTINGS,
            stage="tokenizer",
        )
    for value in (5, {"default": "x"}, [5], [{"name": 5, "template": "x"}], [{"name": "default"}]):
        yield folder_case(
            f"chat_template {value!r}",
            edit(SETTINGS, chat_template=value),
            edit(SETTINGS, chat_template=[{"name": "default", "template": "x"}]),
            file=SETTINGS,
            stage="tokenizer",
        )
    yield folder_case(
        "no UTF-8",
        put("chat_template.jinja", b"\xff"),
        put("chat_template.jinja", "x"),
        file="chat_template.jinja",
        stage="tokenizer",
    )
    yield folder_case(
        "80,000 letters",
        put("chat_template.jinja", "x" * 80_000),
        put("chat_template.jinja", "x" * 200),
        file="chat_template.jinja",
        stage="tokenizer",
    )


def named(f: Folder, file: str, key: str, value: Any) -> None:
    """A special token in one of the two files, and not in the other."""
    fields = json.loads(f.files[SETTINGS])
    fields.pop(key)
    f.files[SETTINGS] = json.dumps(fields)
    f.edit(file, **{key: value})


TEMPLATES = {
    "unclosed": "{{ messages",
    "unclosed block": "{% for m in messages %}",
    "unknown filter": "{{ messages | explode }}",
    "unknown tag": "{% launch %}",
    "an import": "{% import 'x' as x %}{{ x }}",
    "an include": "{% include '/etc/passwd' %}",
    "another file": "{% extends '/etc/passwd' %}",
    "10^4 brackets": "{{ " + "(" * 10**4 + "1" + ")" * 10**4 + " }}",
    "10^4 lists": "{{ " + "[" * 10**4 + "]" * 10**4 + " }}",
    "10^4 negations": "{{ " + "not " * 10**4 + "1 }}",
    "10^4 signs": "{{ " + "-" * 10**4 + "1 }}",
    "3,000 conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "60 loops in loops": "{% for a in messages %}" * 60 + "{% endfor %}" * 60,
    "an unclosed comment of 15,000": "{# " * 15_000,
    "15,000 opened blocks": "{%- " * 15_000,
    "15,000 opened values": "{{" * 15_000,
    "15,000 quotes": "{{ " + '"' * (15_000 + 1) + " }}",
    "15,000 escapes": "{{ '" + "\\" * 15_000 + " }}",
    "15,000 signs in a value": "{{ " + "*" * 15_000 + " }}",
    "a million loop steps": "{% for i in range(1000) %}{% for j in range(1000) %}"
    "{% endfor %}{% endfor %}",
    "a range of 10^9": "{% for i in range(10**9) %}x{% endfor %}",
    "a text of 10^9": "{{ 'a' * 10**9 }}",
    "a list of 10^9": "{{ ([0] * 10**9) | length }}",
    "a number of 10^9 digits": "{{ 10 ** (10 ** 9) }}",
    "a shift by product": "{% set n = namespace(x=2) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "a text doubled 60 times": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a list doubled 60 times": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two macros that call each other": "{% macro f() %}{{ g() }}{% endmacro %}"
    "{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop that calls itself": "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "a padding of 10^9": "{{ 'a'.ljust(10**9) }}",
    "a format of 10^9": "{{ '%1000000000d' % 1 }}",
    "a format's width of 10^9": "{{ '{:>{}}'.format(1, 10**9) }}",
    "an indentation of 10^9": "{{ messages | tojson(indent=10**9) }}",
    "10^9 tabs": "{{ 'a\\t'.expandtabs(10**9) }}",
    "a join that grows": "{{ (['a' * 100000] * 40) | join('b' * 100000) }}",
    "a replacement that grows": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "the interpreter": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the interpreter, by a filter": "{{ messages | attr('__class__') | attr('__mro__') | first }}",
    "globals of a function": "{{ cycler.__init__.__globals__ }}",
    "a format's attributes": "{{ '{0.__class__.__mro__}'.format(messages) + 1 }}",
    "an error of its own": "{{ raise_exception('no') }}",
    "a division by 0": "{{ 1 / 0 }}",
    "an undefined value": "{{ nosuch.thing }}",
    "sorting what has no order": "{{ [1, 'a', none] | sort }}",
}


def templates() -> Iterator[Case]:
    for label, template in TEMPLATES.items():
        yield folder_case(
            f"template: {label}",
            edit(SETTINGS, chat_template=template),
            file="",
            stage="chat",
            error=InvalidRequestError,
        )


def text_cases() -> list[Case]:
    parts = (files, vocabulary, bombs, steps, settings, templates)
    return [case for cases in parts for case in cases()]
