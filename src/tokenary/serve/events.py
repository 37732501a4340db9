"""Answers to clients that may leave: what nobody waits for is broken off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response

from tokenary.serve.stream import Stream

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Events(Response):
    """Server-sent events; the jobs behind them are cancelled when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[str, None], stream: Stream) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._stream = chunks, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or as many as the client waits for."""
        writing, leaving = asyncio.create_task(self._write(send)), asyncio.create_task(_leaves(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stream.close()
            leaving.cancel()
            if not writing.done():
                writing.cancel()
            await asyncio.wait({writing, leaving})
        if not writing.cancelled():
            writing.result()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._chunks):
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Any) -> Any:
    """Do some work; break it off when the client goes."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_leaves(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _leaves(receive: Receive) -> None:
    """Wait until the client goes."""
    while (await receive())["type"] != "http.disconnect":
        pass
