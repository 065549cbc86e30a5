"""Reading a request body within its limit."""

from __future__ import annotations

from starlette.requests import Request

from rapshee_engine.server.errors import ApiError

__all__ = ["read_json_body"]


async def read_json_body(request: Request, *, max_bytes: int) -> bytes:
    """The bytes of a JSON body.

    Raises:
        ApiError: 415 for another content type or a content encoding, 413 beyond ``max_bytes``.
        ClientDisconnect: the client left.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(
            415,
            f"Unsupported content type {content_type!r}: send the body as application/json",
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(
            415, "Compressed request bodies are not supported", code="unsupported_content_encoding"
        )
    # The HTTP parser has checked that a content-length is a number.
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The request body is larger than {max_bytes} bytes",
        code="request_too_large",
        # The rest of the body is not read, so the connection cannot carry another request.
        headers={"connection": "close"},
    )
