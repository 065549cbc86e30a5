from __future__ import annotations

import pytest

from rapshee_engine.models import known_keys


@pytest.mark.parametrize("form", ["HF", "GGUF"])
def test_a_key_has_one_meaning(form: str) -> None:
    honoured = getattr(known_keys, f"{form}_HONOURED")
    harmless = getattr(known_keys, f"{form}_HARMLESS")
    neutral = getattr(known_keys, f"{form}_NEUTRAL").keys()
    assert not honoured & harmless
    assert not honoured & neutral
    assert not harmless & neutral
