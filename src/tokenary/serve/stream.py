"""What the worker says of the jobs of one request, in the order in which it was said."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from tokenary.serve.protocol import Done, Event, Failed, Job, Progress

#: Events that wait for a slow reader; past that, news of a job is joined to what waits of it already.
_WAITING = 64


class Stream:
    """The events of some jobs; close it to cancel what still runs.

    Parameters
    ----------
    jobs : sequence of Job
        Of one request.
    cancel : callable
        Called with the ids of the jobs that had not ended when the stream was closed.
    """

    def __init__(self, jobs: Sequence[Job], cancel: Callable[[set[str]], None]) -> None:
        self.jobs = list(jobs)
        self._number = {job.id: number for number, job in enumerate(jobs)}
        self._running = set(self._number)
        self._left = len(jobs)
        self._events: deque[tuple[int, Event]] = deque()
        self._news = asyncio.Event()
        self._cancel = cancel

    @property
    def ended(self) -> bool:
        """Whether every job has ended, and all was read."""
        return not self._left

    @property
    def waiting(self) -> bool:
        """Whether an event can be read at once."""
        return bool(self._events)

    def done(self, id: str) -> bool:
        """Whether a job has ended."""
        return id not in self._running

    def put(self, event: Event) -> None:
        """Take an event of one of the jobs."""
        if event.id not in self._running:
            return
        number = self._number[event.id]
        if isinstance(event, (Done, Failed)):
            self._running.discard(event.id)
        elif len(self._events) >= _WAITING:
            for at in range(len(self._events) - 1, -1, -1):
                waiting = self._events[at]
                if waiting[0] == number and isinstance(waiting[1], Progress):
                    self._events[at] = (number, joined(waiting[1], event))
                    return
        self._events.append((number, event))
        self._news.set()

    async def peek(self, seconds: float) -> Event | None:
        """Return the next event without taking it; None where none came in that time."""
        if not self._events:
            self._news.clear()
            timer = asyncio.get_running_loop().call_later(seconds, self._news.set)
            try:
                await self._news.wait()
            finally:
                timer.cancel()
        return self._events[0][1] if self._events else None

    async def next(self, seconds: float) -> tuple[int, Event] | None:
        """Return the next event and the number of its job; None where none came in that time."""
        if await self.peek(seconds) is None:
            return None
        number, event = self._events.popleft()
        self._left -= isinstance(event, (Done, Failed))
        return number, event

    def fail(self, status: int, message: str) -> None:
        """End all jobs that still run."""
        for id in list(self._running):
            self.put(Failed(id, status, message))

    def close(self) -> None:
        """Cancel what still runs; may be called twice."""
        running, self._running = self._running, set()
        self._cancel(running)


def joined(one: Progress, other: Progress) -> Progress:
    """Return two passes of a job as one."""
    silent = one.logprobs is None and other.logprobs is None
    return replace(
        other,
        token_ids=one.token_ids + other.token_ids,
        from_draft=one.from_draft + other.from_draft,
        text=one.text + other.text,
        logprobs=None if silent else (one.logprobs or []) + (other.logprobs or []),
    )
