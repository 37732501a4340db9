"""A double of the engine: no model, tokens are bytes, and a job's text is its prompt again.

A prompt that begins with ``!word`` asks for trouble: ``!crash`` kills the worker and ``!later-crash`` does so after
some tokens, ``!defect`` and ``!later-defect`` raise in a step, ``!refuse`` is refused, ``!fail`` fails with 429,
``!hang`` stops the worker's loop, ``!silent`` gets no token, ``!endless`` writes until it is stopped. With ``log``,
every step writes a line of what it ran. Jobs past the first ``places`` wait.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field

from tokenary.core.errors import InputError
from tokenary.serve.protocol import Done, Event, Failed, Job, Progress, TokenLogprob
from tokenary.serve.worker import Ready

END = 256
CONTEXT = 4096


@dataclass
class Running:
    job: Job
    taken: float
    text: bytes
    ids: list[int] = field(default_factory=list)
    passes: int = -1
    accepted: int = 0
    shown: int = 0

    @property
    def trouble(self) -> str:
        word, *_ = self.text.split(maxsplit=1) or [b""]
        return word[1:].decode() if word.startswith(b"!") else ""


class FakeEngine:
    def __init__(self, delay: float = 0.0, log: str = "", places: int = 1000) -> None:
        self.delay, self._log = delay, open(log, "a") if log else None  # noqa: SIM115
        self.places = places
        self.jobs: dict[str, Running] = {}
        self.news: list[Event] = []
        self.steps = 0

    @property
    def idle(self) -> bool:
        return not self.jobs and not self.news

    def submit(self, job: Job) -> None:
        running = Running(job, time.monotonic(), bytes(id for id in job.prompt if id < 256))
        if running.trouble == "refuse":
            raise InputError("the engine refuses this job")
        if running.trouble == "fail":
            self.news.append(Failed(job.id, 429, "the lane is full"))
            return
        self._write({"submit": job.id, "text": running.text.decode("utf-8", "replace")[:40]})
        self.jobs[job.id] = running

    def cancel(self, id: str) -> None:
        self._write({"cancel": id, "step": self.steps})
        if (running := self.jobs.pop(id, None)) is not None:
            self.news.append(self._done(running, "cancelled"))

    def step(self) -> list[Event]:
        if self.jobs:
            self.steps += 1
            self._write({"step": self.steps, "running": list(self.jobs)})
            time.sleep(self.delay)
        events, self.news = self.news, []
        for place, running in enumerate(list(self.jobs.values())):
            events += self._advance(running) if place < self.places else self._wait(running)
        return events

    def _wait(self, running: Running) -> list[Event]:
        job = running.job
        if job.wait is None or time.monotonic() - running.taken < job.wait:
            return []
        del self.jobs[job.id]
        return [Failed(job.id, 429, "it waited")]

    def _advance(self, running: Running) -> list[Event]:
        job = running.job
        if time.monotonic() - running.taken > job.seconds:
            return [self._done(running, "deadline")]
        late = len(running.ids) > 8
        if running.trouble == "crash" or (running.trouble == "later-crash" and late):
            os._exit(3)
        if running.trouble == "defect" or (running.trouble == "later-defect" and late):
            raise ValueError(f"secret: {running.text!r}")
        if running.trouble == "hang":
            time.sleep(3600)
        if running.trouble == "silent":
            return []
        running.passes += 1
        width = 1 if not job.recipe or not running.passes else 3
        text = b'{"kept": true}' if job.schema else running.text
        new = [text[at % len(text)] for at in range(len(running.ids), len(running.ids) + width)]
        if running.trouble != "endless":
            new = [*text, END][len(running.ids) : len(running.ids) + width]
        new = new[: job.max_new_tokens - len(running.ids)]
        running.ids += new
        running.accepted += len(new) - 1
        whole = bytes(id for id in running.ids if id < 256).decode("utf-8", "ignore")  # whole characters
        found = min((whole.index(stop) for stop in job.stop if stop in whole), default=None)
        # what may begin a stop text waits
        settled = len(whole) if found is None else found
        if found is None and END not in new and len(running.ids) < job.max_new_tokens:
            settled -= max((n for stop in job.stop for n in range(len(stop)) if whole.endswith(stop[:n])), default=0)
        fresh, running.shown = whole[running.shown : settled], max(running.shown, settled)
        logprobs = None
        if job.logprobs is not None:
            logprobs = [
                TokenLogprob(-0.5, [(id, -0.5 - n) for n, id in enumerate(range(65, 65 + job.logprobs))]) for _ in new
            ]
        held = [1.0] * (len(job.prompt) + len(running.ids)) if job.watch else None
        events: list[Event] = [
            Progress(job.id, new, [*[True] * (len(new) - 1), False], fresh, logprobs, held),
        ]
        if found is not None or END in new:
            events.append(self._done(running, "stop"))
        elif len(running.ids) >= job.max_new_tokens:
            events.append(self._done(running, "length"))
        return events

    def _done(self, running: Running, finish: str) -> Done:
        self.jobs.pop(running.job.id, None)
        seconds = time.monotonic() - running.taken
        new, passes = len(running.ids), max(running.passes, 0)
        return Done(
            running.job.id,
            finish,
            len(running.job.prompt),
            new,
            passes,
            3 * passes,
            running.accepted,
            1000,
            0.0,
            0.1,
            seconds,
        )

    def _write(self, line: dict) -> None:
        if self._log is not None:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()


def create(
    delay: float = 0.0, log: str = "", load: float = 0.0, broken: str = "", places: int = 1000
) -> tuple[FakeEngine, Ready]:
    time.sleep(load)
    if broken:
        raise InputError(broken)
    return FakeEngine(delay, log, places), Ready("causal", CONTEXT, END + 1, "f" * 64)
