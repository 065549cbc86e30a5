from __future__ import annotations

from typing import Any

import pytest

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.models.fields import Fields


def fields(**values: Any) -> Fields:
    return Fields(values, "config.json")


def test_values_and_defaults() -> None:
    f = fields(size=3, scale=2, flag=True, kind="x", null=None)
    assert f.integer("size", 1, 9) == 3
    assert f.positive("scale") == 2.0
    assert f.flag("flag", default=False) is True
    assert f.choice("kind", ("x", "y")) == "x"
    for key in ("null", "absent"):
        assert f.integer(key, 1, 9, 5) == 5
        assert f.positive(key, 0.5) == 0.5
        assert f.flag(key, default=True) is True
        assert f.choice(key, ("x",), "x") == "x"
        assert not f.has(key)
    assert f.is_listed("null")
    assert not f.is_listed("absent")


@pytest.mark.parametrize("value", [0, 10, -1, 3.0, "3", True, [3], 1 << 70])
def test_integers_are_checked(value: Any) -> None:
    with pytest.raises(WeightFileError, match="size must be an integer from 1 to 9, got"):
        fields(size=value).integer("size", 1, 9)


@pytest.mark.parametrize(
    "value", [0, 0.0, -1.0, float("nan"), float("inf"), 1e31, 1e-31, "1", True, [1.0]]
)
def test_numbers_are_checked(value: Any) -> None:
    with pytest.raises(WeightFileError, match="scale must be a number from"):
        fields(scale=value).positive("scale")


@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_flags_are_checked(value: Any) -> None:
    with pytest.raises(WeightFileError, match="flag must be true or false"):
        fields(flag=value).flag("flag", default=False)


def test_choices_are_checked() -> None:
    with pytest.raises(WeightFileError, match="kind must be a string, got 3"):
        fields(kind=3).choice("kind", ("x",))
    with pytest.raises(UnsupportedModelError, match="kind = 'z' is not supported; supported: x, y"):
        fields(kind="z").choice("kind", ("x", "y"))


@pytest.mark.parametrize("value", [None, ...])
def test_missing_values_are_named(value: Any) -> None:
    f = fields() if value is ... else fields(size=value, scale=value, kind=value)
    with pytest.raises(WeightFileError, match="size is missing"):
        f.integer("size", 1, 9)
    with pytest.raises(WeightFileError, match="scale is missing"):
        f.positive("scale")
    with pytest.raises(WeightFileError, match="kind is missing"):
        f.choice("kind", ("x",))


def test_neutral_values() -> None:
    f = fields(tp=1, other=2)
    f.require_neutral({"tp": 1, "absent": 0})
    with pytest.raises(UnsupportedModelError, match="other = 2 is not supported; supported: 1"):
        f.require_neutral({"other": 1})


def test_unknown_keys_are_refused_unless_null() -> None:
    fields(a=1, b=None).require_known({"a"})
    with pytest.raises(UnsupportedModelError, match=r"config\.json: b = 2 is not known"):
        fields(a=1, b=2).require_known({"a"})


def test_prefix_limits_the_view() -> None:
    f = Fields({"llama.size": 3, "general.name": "x"}, "file.gguf", prefix="llama.")
    f.require_known({"size"})
    assert f.integer("size", 1, 9) == 3
    with pytest.raises(WeightFileError, match=r"file\.gguf: llama\.size must be"):
        f.integer("size", 1, 2)


def test_sections_are_named_in_messages() -> None:
    f = fields(rope={"factor": -1}, wrong=[1])
    with pytest.raises(WeightFileError, match=r"config\.json: rope\.factor must be") as caught:
        f.section("rope").positive("factor")
    assert caught.value.file == "config.json"
    with pytest.raises(WeightFileError, match="wrong must be an object"):
        f.section("wrong")
    assert f.section("absent").get("factor") is None


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(WeightFileError) as caught:
        fields(size="x" * 100_000).integer("size", 1, 9)
    assert len(str(caught.value)) < 400


def test_caps() -> None:
    f = fields(cap=30, off=None)
    assert f.cap("cap", 50.0) == 30.0
    assert f.cap("off", 50.0) == 0.0
    assert f.cap("absent", 50.0) == 50.0
    with pytest.raises(WeightFileError, match="cap must be a number from"):
        fields(cap=0).cap("cap", 50.0)


def test_lists_of_numbers() -> None:
    assert fields(factors=[1, 2.5]).positives("factors", 2) == [1.0, 2.5]


@pytest.mark.parametrize("value", [None, 1.0, [], [1.0], [1.0, 0.0], [1.0, "2"], [1.0, True], {}])
def test_lists_of_numbers_are_checked(value: Any) -> None:
    with pytest.raises(WeightFileError, match=r"factors (must be a list of 2 numbers|is missing)"):
        fields(factors=value).positives("factors", 2)
