"""The stub ``_core.pyi`` says what the built extension has: names, methods, arguments."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest

from rapshee_engine import _core

ROOT = Path(__file__).resolve().parent.parent
STUB = ast.parse((ROOT / "python" / "rapshee_engine" / "_core.pyi").read_text())


@dataclass(frozen=True)
class Signature:
    """Arguments of a function, ``self`` left out.

    Attributes:
        positional: names in order.
        keyword_only: names; None where the native function takes ``**kwargs`` and checks the names
            itself, when it is called.
        optional: names that have defaults.
    """

    positional: tuple[str, ...]
    keyword_only: frozenset[str] | None
    optional: frozenset[str]


def signature_of(function: ast.FunctionDef) -> Signature:
    arguments = function.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    optional = set(positional[len(positional) - len(arguments.defaults) :])
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            optional.add(argument.arg)
    return Signature(
        positional=tuple(name for name in positional if name != "self"),
        keyword_only=None if arguments.kwarg else frozenset(a.arg for a in arguments.kwonlyargs),
        optional=frozenset(optional),
    )


def native_signature(function: object) -> Signature:
    """The signature that pybind11 writes into the first line of a function's docstring."""
    text = inspect.getdoc(function)
    assert text, f"{function!r} has no docstring"
    first_line = text.splitlines()[0]
    node = ast.parse(f"def {first_line}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    return signature_of(node)


def assert_same(stub: Signature, native: Signature) -> None:
    assert native.positional == stub.positional
    if native.keyword_only is not None:
        assert native.keyword_only == stub.keyword_only
        assert native.optional == stub.optional


def is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)


STUB_FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
STUB_CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
STUB_VALUES = {
    node.target.id
    for node in STUB.body
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
}
STUB_MEMBERS = [
    pytest.param(name, member, id=f"{name}.{member.name}")
    for name, node in STUB_CLASSES.items()
    for member in node.body
    if isinstance(member, ast.FunctionDef)
]


def public_names(namespace: object) -> set[str]:
    return {name for name in vars(namespace) if not name.startswith("_")}


def test_both_have_the_same_names() -> None:
    assert public_names(_core) == ({*STUB_FUNCTIONS, *STUB_CLASSES, *STUB_VALUES} - {"__version__"})
    assert isinstance(_core.__version__, str)


@pytest.mark.parametrize("name", STUB_CLASSES)
def test_classes_have_the_same_members(name: str) -> None:
    members = {m.name for m in STUB_CLASSES[name].body if isinstance(m, ast.FunctionDef)}
    assert public_names(getattr(_core, name)) == {m for m in members if not m.startswith("_")}


@pytest.mark.parametrize("name", STUB_CLASSES)
def test_classes_have_the_same_bases(name: str) -> None:
    for base in STUB_CLASSES[name].bases:
        assert isinstance(base, ast.Name)
        assert base.id in {b.__name__ for b in getattr(_core, name).__mro__}


@pytest.mark.parametrize("name", STUB_FUNCTIONS)
def test_functions_take_the_same_arguments(name: str) -> None:
    assert_same(signature_of(STUB_FUNCTIONS[name]), native_signature(getattr(_core, name)))


@pytest.mark.parametrize(("name", "member"), STUB_MEMBERS)
def test_members_take_the_same_arguments(name: str, member: ast.FunctionDef) -> None:
    native = inspect.getattr_static(getattr(_core, name), member.name)
    assert is_property(member) == isinstance(native, property)
    if not is_property(member):
        native_function = getattr(getattr(_core, name), member.name)
        assert_same(signature_of(member), native_signature(native_function))
