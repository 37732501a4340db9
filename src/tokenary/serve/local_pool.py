"""A pool without a process of its own: the engine runs in a thread beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

import psutil

from tokenary.core.errors import TokenaryError
from tokenary.serve.base_pool import LEAVING, LOST, BasePool
from tokenary.serve.protocol import Job
from tokenary.serve.settings import Settings
from tokenary.serve.worker import (
    Ready,
    Refused,
    Worker,
    location,
    make_engine,
    pack_cancel,
    pack_job,
    read_line,
)

log = logging.getLogger("tokenary.serve")

_LAST_STEP = 10.0


class LocalPool(BasePool):
    """One engine in a thread of this process; after a defect it is made anew.

    Parameters
    ----------
    settings : Settings
        Names the engine and its options; bounds the jobs.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker: Worker | None = None

    async def start(self) -> None:
        """Start the thread; returns before the engine is made."""
        self._loop = asyncio.get_running_loop()
        self.refused = self._loop.create_future()
        self._thread.start()

    async def stop(self) -> None:
        """End all jobs, and wait for the step under way."""
        self.state = "stopped"
        self.give_up(LEAVING)
        if self._worker is not None:
            self._worker.hand(b"")
            await asyncio.to_thread(self._thread.join, _LAST_STEP)

    @property
    def resident_bytes(self) -> int:
        """Memory of this process."""
        return int(psutil.Process().memory_info().rss)

    def _send(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._hand(pack_job(job))

    def _send_cancel(self, ids: Collection[str]) -> None:
        for id in ids:
            self._hand(pack_cancel(id))

    def _hand(self, line: bytes) -> None:
        if self._worker is not None:
            self._worker.hand(line)

    def write(self, line: bytes) -> None:
        """Take what the engine says, in its thread."""
        said = read_line(line)
        self._call(lambda: self._hear(said))

    def flush(self) -> None:
        """Do nothing: what is written is told already."""

    def _call(self, function: Callable[[], None]) -> None:
        """Have the event loop do something, unless it has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def _work(self) -> None:
        """Make an engine and run it, one after the other; in the thread."""
        while self.state != "stopped":
            try:
                engine, ready = make_engine(self._settings.engine, self._settings.engine_options)
            except Exception as error:
                told = (
                    str(error) if isinstance(error, TokenaryError) else f"the model cannot be loaded: {location(error)}"
                )
                refused = Refused(" ".join(told.split()))
                self._call(lambda refused=refused: self._hear([refused]))  # type: ignore[misc]
                return
            self._worker = worker = Worker(engine, self)  # type: ignore[arg-type]
            self._call(lambda ready=ready: self._hear([ready]))  # type: ignore[misc]
            try:
                worker.run()
            except Exception as error:
                log.error("the engine ends: %s", location(error))
                worker.fail(error)
                self._call(self._died)
            self._worker = None
            del engine, worker  # before the next is made

    def _died(self) -> None:
        self.state = "dead" if self.state != "stopped" else "stopped"
        self.restarts += 1
        self.give_up(LOST)

    def _hear(self, said: Sequence[object]) -> None:
        """Pass on what the engine says."""
        self._heard = time.monotonic()
        for one in said:
            if isinstance(one, Ready):
                self.info, self.state = one, "ready" if self.state != "stopped" else "stopped"
            elif isinstance(one, Refused):
                self.state = "dead" if self.state != "stopped" else "stopped"
                self._refuse(one.message)
            else:
                self._pass_on(one)  # type: ignore[arg-type]
