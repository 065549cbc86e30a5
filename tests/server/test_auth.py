"""Bearer authentication."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

Send = Callable[..., httpx.Response]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        b"Basic dGVzdC1rZXk=",
        b"test-key",
        b"Bearertest-key",
        b"Bearer test-key extra",
        b"Bearer test-key, Bearer test-key",
        b"Bearer t\xc3\xa9st-key",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 100_000,
    ],
)
def test_anything_but_a_known_key_is_401(send: Send, value: bytes) -> None:
    response = send("GET", "/v1/models", key=None, headers={b"authorization": value})
    assert response.status_code == 401
    assert response.json() == {
        "error": {
            "message": "Invalid API key provided",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }
    assert response.headers["www-authenticate"] == "Bearer"


def test_no_header_and_two_headers_are_401(send: Send) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/nowhere"):
        assert send("GET", path, key=None).status_code == 401
    header = {"authorization": "Bearer test-key", "Authorization": "Bearer test-key"}
    twice = list(header.items())
    assert send("GET", "/v1/models", key="test-key").status_code == 200
    app_headers = httpx.Headers(twice)
    response = send("GET", "/v1/models", key=None, headers=app_headers)
    assert response.status_code == 401


def test_the_scheme_is_case_insensitive(send: Send) -> None:
    headers = {"authorization": "bearer  test-key "}
    assert send("GET", "/v1/models", key=None, headers=headers).status_code == 200


def test_the_operator_s_tools_need_no_key_and_only_they(send: Send) -> None:
    for path in ("/health/live", "/metrics"):
        assert send("GET", path, key=None).status_code == 200
    for path in ("/healthy", "/metrics/", "/metrics/x", "/v1/metrics"):
        assert send("GET", path, key=None).status_code == 401
