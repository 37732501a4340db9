"""What all pools have in common: the jobs that are under way, and the streams of what is said of them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Literal

from tokenary.serve.errors import ApiError
from tokenary.serve.protocol import Event, Job
from tokenary.serve.settings import Settings
from tokenary.serve.stream import Stream
from tokenary.serve.worker import Ready

State = Literal["loading", "ready", "dead", "stopped"]

#: What jobs are told that end with their worker, or with the server.
LOST, LEAVING = "the worker died while it wrote; try again", "the server is shutting down"
FIRST_TRIES = 3  # to get a model loaded at all
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a worker is started again


class BasePool(ABC):
    """Whoever writes texts: one worker or several, here or elsewhere.

    Parameters
    ----------
    settings : Settings
        Names the engine and its options; bounds the jobs.

    Attributes
    ----------
    state : str
        ``loading``, ``ready``, ``dead`` (it will be started again) or ``stopped``.
    info : Ready or None
        Of the model; stays when a worker dies.
    restarts : int
        How often a worker was started again.
    refused : Future
        Why no worker could ever load the model; made by `start`.
    """

    refused: asyncio.Future[str]

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.state: State = "loading"
        self.info: Ready | None = None
        self.restarts = 0
        self._streams: dict[str, Stream] = {}
        self._heard = 0.0

    @abstractmethod
    async def start(self) -> None:
        """Start all workers; returns before they are ready."""

    @abstractmethod
    async def stop(self) -> None:
        """End all jobs and all workers."""

    @abstractmethod
    def _send(self, jobs: Sequence[Job]) -> None:
        """Hand the jobs of a request to a worker."""

    @abstractmethod
    def _send_cancel(self, ids: Collection[str]) -> None:
        """Tell the worker of these jobs, all of one request, to end them."""

    def submit(self, jobs: Sequence[Job]) -> Stream:
        """Hand jobs to a worker, all or none.

        Raises
        ------
        ApiError
            503 where no worker is ready, 429 where there are too many jobs.
        """
        if self.state != "ready":
            raise ApiError(503, f"the model is not ready: its worker is {self.state}")
        if len(self._streams) + len(jobs) > self._settings.max_jobs:
            raise ApiError(429, f"the server writes at most {self._settings.max_jobs} texts at a time")
        if not self._streams:  # it had nothing to say until now
            self._heard = time.monotonic()
        stream = Stream(jobs, self._cancel)
        self._streams.update(dict.fromkeys((job.id for job in jobs), stream))
        self._send(jobs)
        return stream

    @property
    def jobs(self) -> int:
        """Texts that run or wait."""
        return len(self._streams)

    @property
    def stalled(self) -> bool:
        """Whether there are jobs, and nothing was heard for too long."""
        return bool(self._streams) and time.monotonic() - self._heard > self._settings.stall

    @property
    def resident_bytes(self) -> int:
        """Memory of the workers."""
        return 0

    def give_up(self, message: str) -> None:
        """End all jobs with 503."""
        streams, self._streams = self._streams, {}
        for stream in set(streams.values()):
            stream.fail(503, message)

    def _refuse(self, message: str) -> None:
        """Say why no worker can load the model."""
        if not self.refused.done():
            self.refused.set_result(message)

    def _cancel(self, ids: set[str]) -> None:
        if known := [id for id in ids if self._streams.pop(id, None)]:
            self._send_cancel(known)

    def _pass_on(self, event: Event) -> None:
        """Put an event into its stream."""
        if (stream := self._streams.get(event.id)) is not None:
            stream.put(event)
            if stream.done(event.id):
                del self._streams[event.id]
