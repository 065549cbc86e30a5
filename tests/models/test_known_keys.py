from __future__ import annotations

import pytest

from rapshee_engine.models import known_keys
from rapshee_engine.models.gguf_families import GGUF_FAMILIES
from rapshee_engine.models.hf_families import HF_FAMILIES


@pytest.mark.parametrize("form", ["HF", "GGUF"])
def test_a_key_has_one_meaning(form: str) -> None:
    honoured = getattr(known_keys, f"{form}_HONOURED")
    harmless = getattr(known_keys, f"{form}_HARMLESS")
    neutral = getattr(known_keys, f"{form}_NEUTRAL").keys()
    assert not honoured & harmless
    assert not honoured & neutral
    assert not harmless & neutral


@pytest.mark.parametrize("model_type", sorted(HF_FAMILIES))
def test_a_key_has_one_meaning_in_a_family(model_type: str) -> None:
    family = HF_FAMILIES[model_type]
    neutral = family.neutral.keys()
    assert not family.keys & family.harmless
    assert not (family.keys | family.harmless) & neutral
    # What is neutral elsewhere may mean something here, nothing else.
    others = known_keys.HF_HARMLESS | (known_keys.HF_HONOURED - {"hidden_act"})
    assert not (family.keys | family.harmless | neutral) & others


@pytest.mark.parametrize("architecture", sorted(GGUF_FAMILIES))
def test_a_key_has_one_meaning_in_an_architecture(architecture: str) -> None:
    keys = GGUF_FAMILIES[architecture].keys
    assert not keys & (known_keys.GGUF_HONOURED | known_keys.GGUF_HARMLESS)
    assert not keys & known_keys.GGUF_NEUTRAL.keys()
