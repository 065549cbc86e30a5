"""Typed, checked access to a checkpoint's hyper-parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rapshee_engine.errors import UnsupportedModelError, WeightFileError
from rapshee_engine.files import short_repr

__all__ = ["Fields"]


class Fields:
    """View of a mapping that came from a file.

    Each getter raises `WeightFileError` naming ``source`` and the key when the key is absent and
    no default is given, or when its value has the wrong type or range. JSON's null counts as
    absent.

    Args:
        values: the hyper-parameters.
        source: path of the file, for messages.
        prefix: put before each key that is asked for, e.g. ``llama.``.
        section: path of the mapping inside the file, for messages, e.g. ``rope_scaling.``.
    """

    __slots__ = ("_prefix", "_section", "_values", "source")

    def __init__(
        self, values: Mapping[str, Any], source: str, *, prefix: str = "", section: str = ""
    ) -> None:
        self._values = values
        self._prefix = prefix
        self._section = section
        self.source = source

    def path_of(self, key: str) -> str:
        """The key as messages give it."""
        return f"{self._section}{self._prefix}{key}"

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        return self._values.get(self._prefix + key)

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def is_listed(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        return self._prefix + key in self._values

    def section(self, key: str) -> Fields:
        """The object under ``key``; an empty one where it is absent."""
        value = self.get(key) if self.has(key) else {}
        if not isinstance(value, dict):
            raise self.invalid(key, "an object")
        return Fields(value, self.source, section=f"{self.path_of(key)}.")

    def invalid(self, key: str, must: str) -> WeightFileError:
        """The error for a value that cannot be."""
        if not self.has(key):
            return WeightFileError(self.source, f"{self.path_of(key)} is missing")
        got = short_repr(self.get(key))
        return WeightFileError(self.source, f"{self.path_of(key)} must be {must}, got {got}")

    def unsupported(self, key: str, supported: str) -> UnsupportedModelError:
        """The error for a value that this engine does not implement."""
        return UnsupportedModelError(
            f"{self.source}: {self.path_of(key)} = {short_repr(self.get(key))} is not supported;"
            f" supported: {supported}"
        )

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.invalid(key, f"an integer from {low} to {high}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above zero that float32 can hold."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 1e-30 <= value <= 1e30:
            raise self.invalid(key, "a number from 1e-30 to 1e30")
        return float(value)

    def cap(self, key: str, default: float) -> float:
        """A soft cap: a number above zero; 0 where the key is null, ``default`` where it is
        absent."""
        if not self.is_listed(key):
            return default
        return self.positive(key) if self.has(key) else 0.0

    def positives(self, key: str, count: int) -> list[float]:
        """A list of ``count`` numbers above zero that float32 can hold."""
        values = self.get(key)
        if (
            not isinstance(values, list)
            or len(values) != count
            or not all(type(v) in (int, float) and 1e-30 <= v <= 1e30 for v in values)
        ):
            raise self.invalid(key, f"a list of {count} numbers from 1e-30 to 1e30")
        return [float(value) for value in values]

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.invalid(key, "true or false")
        return value

    def choice(self, key: str, supported: Collection[str], default: str | None = None) -> str:
        """One of ``supported``; another string is `UnsupportedModelError`."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not str:
            raise self.invalid(key, "a string")
        if value not in supported:
            raise self.unsupported(key, ", ".join(supported))
        return value

    def require_neutral(self, neutral: Mapping[str, Any]) -> None:
        """Refuse keys of ``neutral`` that are present with any other value than the given one,
        the only one that leaves the maths as implemented here."""
        for key, expected in neutral.items():
            if self.has(key) and self.get(key) != expected:
                raise self.unsupported(key, repr(expected))

    def require_known(self, known: Collection[str]) -> None:
        """Refuse keys (below the prefix) that are not in ``known`` and not null: they might
        change the maths."""
        for full_key, value in self._values.items():
            if not full_key.startswith(self._prefix) or value is None:
                continue
            if full_key[len(self._prefix) :] not in known:
                raise UnsupportedModelError(
                    f"{self.source}: {self._section}{full_key} = {short_repr(value)} is not known"
                    " to this engine and might change the model's results"
                )
