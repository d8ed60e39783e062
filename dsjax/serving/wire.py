"""JSON over HTTP: bodies are read within limits, and every error has OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from dsjax.serving.json_body import parse_object
from dsjax.serving.protocol import RequestError

RETRY_SECONDS = {429: "1", 503: "5"}
"""When a client that was refused for now should try again."""


def dump(value: object) -> bytes:
    r"""JSON in UTF-8. Half a surrogate pair, which UTF-8 cannot say, stays escaped.

    >>> dump({"é": "\ud800"})
    b'{"\xc3\xa9":"\\ud800"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A whole answer."""
    return Response(dump(value), status, headers, media_type="application/json")


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """What went wrong, as OpenAI says it."""
    headers = dict(headers or {})
    if error.status in RETRY_SECONDS:
        headers["Retry-After"] = RETRY_SECONDS[error.status]
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return json_response(error.body(), error.status, headers)


async def read_object(request: Request, *, limit: int, seconds: float) -> dict[str, Any]:
    """The JSON object in a body of at most `limit` bytes that arrives within `seconds`.

    Raises:
        RequestError: 400, 408, 413 or 415. What still comes of a refused body is thrown away by
            uvicorn, so that a client which sends it all first still reads the answer.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the body's content-type is {kind or 'missing'}; expected application/json"
        raise RequestError(415, message, code="unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"the body's content-encoding is {encoding}; send it uncompressed"
        raise RequestError(415, message, code="unsupported_content_encoding")
    try:
        async with asyncio.timeout(seconds):
            return parse_object(await _read(request, limit))
    except ValueError as error:
        raise RequestError(400, f"the body {error}", code="invalid_json") from None
    except TimeoutError:
        message = f"the body did not arrive within {seconds:g} s"
        raise RequestError(408, message, code="timeout") from None
    except ClientDisconnect:
        # Nobody will read this.
        raise RequestError(400, "the body did not arrive", code="disconnected") from None


async def _read(request: Request, limit: int) -> bytes:
    """Never holds more than the limit and one chunk, whatever Content-Length claims."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20 and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"the body is larger than {limit} bytes", code="body_too_large")
