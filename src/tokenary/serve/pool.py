"""The parent's side of the worker: starts it, hands it jobs, and starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Collection, Sequence

import psutil

from tokenary.serve.base_pool import FIRST_PAUSE, FIRST_TRIES, LEAVING, LONGEST_PAUSE, LOST, BasePool
from tokenary.serve.protocol import Job
from tokenary.serve.settings import Settings
from tokenary.serve.worker import Ready, Refused, pack_cancel, pack_job, read_line

log = logging.getLogger("tokenary.serve")

_LONGEST_LINE = 64 << 20
_STEADY = 60.0  # a worker that lived so long begins with a short pause again


class Pool(BasePool):
    """One worker process and the jobs that it has.

    Parameters
    ----------
    settings : Settings
        Names the engine and its options; bounds the jobs.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._process: Process | None = None
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the worker; returns before it is ready."""
        self.refused = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the worker: let it end by itself, then kill it."""
        self.state = "stopped"
        self.give_up(LEAVING)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._supervisor is not None:
            done, _ = await asyncio.wait([self._supervisor], timeout=5)
            if not done:
                self._supervisor.cancel()
                await asyncio.wait([self._supervisor])

    def _send(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._write(pack_job(job))

    def _send_cancel(self, ids: Collection[str]) -> None:
        for id in ids:
            self._write(pack_cancel(id))

    def _write(self, line: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(line)

    @property
    def pid(self) -> int | None:
        """Of the worker."""
        return None if self._process is None else self._process.pid

    @property
    def resident_bytes(self) -> int:
        """Memory of the worker."""
        with contextlib.suppress(psutil.Error):
            if self.pid is not None:
                return int(psutil.Process(self.pid).memory_info().rss)
        return 0

    async def _supervise(self) -> None:
        """Run one worker after the other."""
        pause, watch = FIRST_PAUSE, asyncio.create_task(self._watch())
        try:
            while self.state != "stopped":
                began = time.monotonic()
                await self._run_worker()
                if self.info is None and self.restarts == FIRST_TRIES - 1:
                    self._refuse(f"the worker died {FIRST_TRIES} times while it loaded the model")
                if self.state == "stopped" or self.refused.done():
                    return
                pause = FIRST_PAUSE if time.monotonic() - began > _STEADY else pause
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                self.restarts += 1
        finally:
            watch.cancel()

    async def _run_worker(self) -> None:
        """Start a worker and listen to it until it ends."""
        self.state = "loading" if self.state != "stopped" else "stopped"
        options = json.dumps(self._settings.engine_options)
        command = [sys.executable, "-m", "tokenary.serve.worker", self._settings.engine, options]
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=_LONGEST_LINE)
        self._process = process
        try:
            assert process.stdout is not None
            while line := await process.stdout.readline():
                self._hear(line)
        except (ValueError, KeyError, TypeError) as error:  # a line that is too long, or no event
            log.error("the worker says what cannot be read: %s", type(error).__name__)
        finally:
            self._process = None
            if process.returncode is None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), 1)  # it closed its pipe, so it is ending
            if process.returncode is None:
                process.kill()
            code = await process.wait()
            if self.state != "stopped":
                self.state = "dead"
                log.error("the worker ended with %s, %s texts were lost", code, len(self._streams))
            self.give_up(LOST)

    def _hear(self, line: bytes) -> None:
        """Pass on what the worker says."""
        self._heard = time.monotonic()
        for said in read_line(line):
            if isinstance(said, Ready):
                self.info, self.state = said, "ready" if self.state == "loading" else self.state
                log.info("the worker is ready")
            elif isinstance(said, Refused):
                log.error("the model cannot be loaded: %s", said.message)
                if self.info is None:
                    self._refuse(said.message)
            else:
                self._pass_on(said)

    async def _watch(self) -> None:
        """Kill a worker that has jobs and says nothing."""
        while True:
            await asyncio.sleep(min(5.0, self._settings.stall / 4))
            if self.state == "ready" and self.stalled and self._process is not None:
                log.error("the worker has said nothing for %g s and is killed", self._settings.stall)
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
