"""Exceptions as error objects."""

from __future__ import annotations

import json
import logging

import pytest
from starlette.exceptions import HTTPException

from rapshee_engine.errors import ContextLengthError, EngineClosedError, StepError
from rapshee_engine.server.errors import ApiError, error_json, error_response, to_api_error

SCOPE = {"method": "GET", "path": "/x"}


def test_the_error_object_has_four_keys() -> None:
    error = ApiError.invalid("wrong", "messages.0.role")
    assert json.loads(error_json(error)) == {
        "error": {
            "message": "wrong",
            "type": "invalid_request_error",
            "param": "messages.0.role",
            "code": None,
        }
    }
    assert error_response(error).status_code == 400


def test_engine_errors() -> None:
    error = to_api_error(ContextLengthError("too long", param="messages"), SCOPE)
    assert (error.status, error.param, error.code) == (400, "messages", "context_length_exceeded")
    error = to_api_error(EngineClosedError("closed"), SCOPE)
    assert (error.status, error.type) == (503, "server_error")
    assert (error.headers["retry-after"], error.headers["retry-after-ms"]) == ("1", "1000")


def test_unexpected_errors_are_logged_and_hidden(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = to_api_error(StepError("internals"), SCOPE)
    assert (error.status, error.type, error.code) == (500, "server_error", None)
    assert "internals" not in error.message
    assert caplog.records[0].exc_info is not None


def test_other_routing_errors_keep_their_status() -> None:
    error = to_api_error(HTTPException(400, "odd"), SCOPE)
    assert (error.status, error.message) == (400, "odd")
