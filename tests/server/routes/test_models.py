"""``/v1/models``."""

from __future__ import annotations

from collections.abc import Callable

import httpx

Send = Callable[..., httpx.Response]

FAKE = {"id": "fake", "object": "model", "created": 1_700_000_000, "owned_by": "rapshee"}


def test_lists_all_names(send: Send) -> None:
    response = send("GET", "/v1/models")
    assert response.status_code == 200
    assert response.json() == {"object": "list", "data": [FAKE, {**FAKE, "id": "fake-mini"}]}


def test_retrieves_one(send: Send) -> None:
    assert send("GET", "/v1/models/fake").json() == FAKE


def test_an_unknown_name_is_404(send: Send) -> None:
    for name in ("other", "a/b", "..%2Ffake", ""):
        response = send("GET", f"/v1/models/{name}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
