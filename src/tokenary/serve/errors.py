"""Refusals in the shape that clients of OpenAI know: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_value",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "service_unavailable",
    504: "deadline_exceeded",
}


class ApiError(Exception):
    """A request that is refused.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        For the client.
    param : str, optional
        The field at fault.
    code : str, optional
        By default that of the status.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status, "error")

    def body(self) -> dict[str, Any]:
        """Return what the client is told."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return what must stand in the head of the answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}

    def response(self, **headers: str) -> Response:
        """Return the answer; in ASCII, since a client's field names may hold what is no text."""
        head = {**self.headers(), **headers}
        return Response(json.dumps(self.body()), self.status, head, media_type="application/json")


async def refused(request: Request, error: Exception) -> Response:
    """Answer an `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def invalid(request: Request, error: Exception) -> Response:
    """Answer a body that is not what the route takes."""
    assert isinstance(error, RequestValidationError)
    return fault(error.errors(), error.body).response()


def fault(errors: Sequence[Any], body: Any) -> ApiError:
    """Word the first fault of a body, without what stood there.

    Parameters
    ----------
    errors : sequence of dict
        As pydantic lists them; the first part of each place is the body itself.
    body : object
        The body.
    """
    # where several types would do, the fault that says most is not "another type"
    first = min(errors, key=lambda one: str(one["type"]).endswith("_type"))
    where = _path(first["loc"], body)
    message = str(first["msg"]).removeprefix("Value error, ")
    code = "unknown_field" if first["type"] == "extra_forbidden" else None
    if code is not None:
        message = "this server does not know the field"
    return ApiError(422, f"{where}: {message}" if where else message, where or None, code)


def _path(places: Sequence[Any], body: Any) -> str:
    """Return where in a body a fault is, without the names of types that stand in its location too."""
    kept = []
    for place in list(places)[1:]:
        if place in body if isinstance(body, dict) else isinstance(body, list) and place in range(len(body)):
            kept.append(str(place))
            body = body[place]
        elif place == places[-1] and isinstance(body, dict):  # a field that is missing
            kept.append(str(place))
    return ".".join(kept or [str(place) for place in places[1:2]])[:200]


async def http_error(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses: unknown routes, wrong methods, bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    status = 422 if error.status_code == 400 else error.status_code
    words = {404: "there is no such route", 405: "the route does not take this method", 422: "the body is no JSON"}
    headers = {name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"}
    return ApiError(status, words.get(status, str(error.detail))).response(**headers)
