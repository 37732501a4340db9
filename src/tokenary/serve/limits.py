"""What stands before every route: who may ask, how much at a time, how large, how long; and an end for every error."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from tokenary.serve.base_pool import LEAVING
from tokenary.serve.body import Body
from tokenary.serve.errors import ApiError
from tokenary.serve.settings import Settings
from tokenary.serve.worker import location

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tokenary.serve.metrics import Metrics

log = logging.getLogger("tokenary.serve")

_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_HEADERS = [(name.lower().encode(), value.encode()) for name, value in _SAFE.items()]


class SlowClient(Exception):
    """A client does not take what is written to it."""


class Gate:
    """ASGI middleware around an application.

    Parameters
    ----------
    app : ASGI application
        What is guarded.
    settings : Settings
        The limits.
    metrics : Metrics
        Where requests are counted.
    open_paths : frozenset of str
        Paths that anyone may read, beside ``/health``: the playground's files.

    Attributes
    ----------
    draining : bool
        Refuse new requests.
    in_flight : int
        Requests that hold a place.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, open_paths: frozenset[str]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._open = open_paths
        self._key = None if settings.api_key is None else _digest(f"Bearer {settings.api_key}".encode())
        self.draining = False
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        body = Body(receive, self._settings.max_body, self._settings.receive_seconds)
        answer = _Answer(send, self._settings.send_seconds)
        began = time.perf_counter()
        try:
            await self._handle(scope, body, answer)
        except ApiError as error:
            await body.discard()
            await answer.refuse(error, scope, receive)
        except SlowClient:
            log.warning("a client did not read for %g s; its connection is closed", self._settings.send_seconds)
            scope.get("state", {}).get("abort", lambda: None)()
        except Exception as error:
            log.error("a request failed: %s", location(error))
            await answer.refuse(ApiError(500, f"a defect of the server: {type(error).__name__}"), scope, receive)
        route = getattr(scope.get("route"), "path", "none")
        seconds = time.perf_counter() - began
        self._metrics.requests.labels(route, str(answer.status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if route != "/health":  # asked every few seconds
            log.info("%s %s %s %.3f s", scope["method"] if route != "none" else "-", route, answer.status, seconds)

    async def _handle(self, scope: Scope, body: Body, send: Send) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        if len(scope["headers"]) > self._settings.max_headers:
            raise ApiError(431, f"a request may have {self._settings.max_headers} headers")
        if path == "/health" and scope["method"] in ("GET", "HEAD"):
            await self._app(scope, body, send)
            return
        if self._key is None:
            self._check_site(headers)
        if path in self._open and scope["method"] in ("GET", "HEAD"):
            await self._app(scope, body, send)
            return
        if self._key is not None and not hmac.compare_digest(_digest(_raw(scope, b"authorization")), self._key):
            raise ApiError(401, "this server asks for an API key: Authorization: Bearer KEY")
        if path == "/metrics":
            await self._app(scope, body, send)
            return
        if self.draining:
            raise ApiError(503, LEAVING)
        if self.in_flight >= self._settings.max_in_flight:
            raise ApiError(429, f"the server answers {self._settings.max_in_flight} requests at a time")
        self.in_flight += 1
        self._metrics.in_flight.set(self.in_flight)
        try:
            if scope["method"] == "POST":
                kind = headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise ApiError(415, "the body must be application/json")
            await body.read(headers.get("content-length", ""))
            await self._app(scope, body, send)
        finally:
            self.in_flight -= 1
            self._metrics.in_flight.set(self.in_flight)

    def _check_site(self, headers: Headers) -> None:
        """Refuse pages of other sites, and names that a stranger made point here (DNS rebinding).

        Where there is a key, no browser knows it by itself.
        """
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "requests from pages of other sites are refused")
        if not _is_ours(host, self._settings.host):
            raise ApiError(403, "without an API key the server is called by its address or as localhost")


class _Answer:
    """A ``send`` that adds headers, knows what it sent, and does not wait for ever."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            raise SlowClient from None

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Answer with an error; where an answer has begun, leave it unfinished, which closes the connection."""
        if not self.status:
            # the body may not have been read, and what comes of it is no next request
            await error.response(Connection="close")(scope, receive, self)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _raw(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _is_ours(host: str, bound: str) -> bool:
    """Whether a Host header is an address, localhost, or what the server was bound to."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name in ("localhost", bound):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
