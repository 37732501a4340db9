"""What runs on a Ray cluster: a replica that owns a model and its engine. It is imported there, so it must be small."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from tokenary.serve.errors import ApiError
from tokenary.serve.local_pool import LocalPool
from tokenary.serve.protocol import Event, Failed, Job
from tokenary.serve.settings import Settings
from tokenary.serve.worker import Ready, Refused

#: Seconds between two signs of life.
SIGN = 1.0


class Replica:
    """A model, its engine, and the requests that it writes; the class of a Ray Serve deployment.

    Parameters
    ----------
    settings : dict
        ``engine``, ``engine_options``, ``max_jobs`` and ``stall`` of `Settings`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._pool = LocalPool(Settings(**settings))
        self._begun: asyncio.Task[None] | None = None

    async def life(self) -> AsyncGenerator[Ready | Refused | int, None]:
        """Tell when the model is there, or why not; then, again and again, the bytes of memory that it takes.

        The process ends where the engine hangs; Ray starts another one.
        """
        self._begun = self._begun or asyncio.create_task(self._pool.start())
        await self._begun
        known: Ready | None = None
        while not self._pool.stalled:
            if self._pool.refused.done():
                yield Refused(self._pool.refused.result())
                return
            if self._pool.info is not known:
                known = self._pool.info
                assert known is not None
                yield known
            elif known is not None:
                yield self._pool.resident_bytes
            await asyncio.sleep(SIGN if known is not None else 0.05)
        os._exit(1)

    async def write(self, jobs: Sequence[Job]) -> AsyncGenerator[list[Event], None]:
        """Write the texts of a request; where nobody listens any more, they are cancelled."""
        try:
            stream = self._pool.submit(jobs)
        except ApiError as error:
            yield [Failed(job.id, error.status, error.message) for job in jobs]
            return
        try:
            while not stream.ended:
                found = await stream.next(60.0)
                events = [] if found is None else [found[1]]
                while stream.waiting and (found := await stream.next(0)) is not None:
                    events.append(found[1])
                if events:
                    yield events
        finally:
            stream.close()
