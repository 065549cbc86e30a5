"""The small vocabularies of ``tests/golden``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rapshee_engine.tokenizer import Tokenizer, tokenizer_from_folder

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def byte_level_folder() -> Path:
    return GOLDEN / "chat_tokenizers" / "byte_level"


@pytest.fixture(scope="session")
def byte_fallback_folder() -> Path:
    return GOLDEN / "chat_tokenizers" / "byte_fallback"


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return tokenizer_from_folder(byte_level_folder)


@pytest.fixture(scope="session")
def byte_fallback(byte_fallback_folder: Path) -> Tokenizer:
    return tokenizer_from_folder(byte_fallback_folder)


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return tokenizer_from_folder(GOLDEN / "tokenizers" / "llama")


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "chat_templates.json").read_text())
