from __future__ import annotations

import models_page


def test_the_page_is_made_from_the_code_as_it_is() -> None:
    assert models_page.PAGE.read_text() == models_page.render(), "run scripts/models_page.py"


def test_every_golden_is_on_the_page() -> None:
    page = models_page.render()
    for case in models_page.golden_cases():
        assert case["name"] in page


def test_a_mechanism_is_named_where_it_is() -> None:
    assert models_page.mechanisms("llama") == ["optional biases"]
    gemma = models_page.mechanisms("gemma3_text")
    assert {"two rope bases", "norms before and after", "scaled embeddings"} <= set(gemma)
    assert "layers without rotation" in models_page.mechanisms("smollm3")
    assert "scaled residuals" in models_page.mechanisms("granite")
