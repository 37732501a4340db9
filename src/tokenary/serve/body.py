"""The body of a request: read whole, no more and no longer than the limits, whatever its head promises."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from tokenary.serve.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import Message, Receive

#: What is refused is read so far, so that its sender gets to read the refusal.
_READ_ON = 16_000_000


class Body:
    """A ``receive`` that can be read ahead; then it gives the body again, and what comes after it.

    Parameters
    ----------
    receive : callable
        Of the server.
    most : int
        Bytes.
    seconds : float
        In which all of it must come.
    """

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive, self._most, self._seconds = receive, most, seconds
        self._body: bytes | None = None
        self._came = False  # all of it, or nothing more is waited for

    async def __call__(self) -> Message:
        """Return the next message."""
        if self._body is None:
            return await self._next()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def read(self, declared: str) -> None:
        """Read all of it.

        Parameters
        ----------
        declared : str
            The content-length header; empty where there is none.

        Raises
        ------
        ApiError
            413 for one that is too large, 408 for one that does not come.
        """
        if declared.isdigit() and int(declared[:20]) > self._most:
            raise ApiError(413, f"a body may have {self._most} bytes")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._seconds):
                while not self._came:
                    message = await self._next()
                    if message["type"] == "http.disconnect":
                        raise ApiError(408, "the client is gone")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._most:
                        raise ApiError(413, f"a body may have {self._most} bytes")
        except TimeoutError:
            self._came = True  # as much as ever will
            raise ApiError(408, f"the body did not come within {self._seconds:g} s") from None
        self._body = b"".join(parts)

    async def discard(self) -> None:
        """Read what is left of it, within bounds, and forget it."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                while not self._came and size < _READ_ON:
                    size += len((await self._next()).get("body", b""))

    async def _next(self) -> Message:
        message = await self._receive()
        self._came = self._came or message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message
