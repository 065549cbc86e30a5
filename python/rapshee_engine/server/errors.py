"""Exceptions, and their form as the API's error object."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rapshee_engine.errors import EngineClosedError, InvalidRequestError

__all__ = ["ApiError", "error_json", "error_response", "to_api_error"]

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


class ApiError(Exception):
    """An error with its HTTP status and the four fields of the API's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def invalid(cls, message: str, param: str | None, code: str | None = None) -> ApiError:
        """A 400 that names the offending field."""
        return cls(400, message, param=param, code=code)

    @classmethod
    def try_later(cls, message: str, *, code: str, retry_after_s: int = 1) -> ApiError:
        """A 503 that says when to come back."""
        return cls(
            503,
            message,
            type=SERVER_ERROR,
            code=code,
            headers={
                "retry-after": f"{retry_after_s}",
                "retry-after-ms": f"{retry_after_s * 1000}",
            },
        )


def to_api_error(error: Exception, scope: Mapping[str, Any]) -> ApiError:
    """What the client is told about an exception. An unexpected one is logged, not described."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError.invalid(str(error), error.param, error.code)
    if isinstance(error, EngineClosedError):
        return ApiError.try_later("The server is shutting down.", code="server_shutting_down")
    if isinstance(error, HTTPException):
        return _routing_error(error, scope)
    logger.error("request failed", exc_info=error)
    return ApiError(500, "The server had an error while processing the request.", type=SERVER_ERROR)


def _routing_error(error: HTTPException, scope: Mapping[str, Any]) -> ApiError:
    where = f"{scope['method']} {scope['path']}"
    if error.status_code == 404:
        return ApiError(404, f"Unknown request URL: {where}", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return ApiError(
            405,
            f"Method not allowed: {where}; allowed: {allowed}",
            code="method_not_allowed",
            headers={"allow": allowed},
        )
    return ApiError(error.status_code, error.detail)


def error_json(error: ApiError) -> bytes:
    """The error object as JSON: always the same four keys."""
    fields = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    return msgspec.json.encode({"error": fields})


def error_response(error: ApiError) -> Response:
    return Response(
        error_json(error),
        status_code=error.status,
        headers=error.headers,
        media_type="application/json",
    )
