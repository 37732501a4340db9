"""The worker process: owns the model and runs the engine. Lines of JSON come on stdin, events leave on stdout.

It is run as::

    python -m tokenary.serve.worker MODULE:FUNCTION OPTIONS

The function, called with the options (a JSON object) as keywords, loads what it needs and returns the engine and a
`Ready`. An engine has ``submit(job)``, ``cancel(id)``, ``step() -> list of events`` and ``idle``. Messages are taken
before every step, so a cancelled job ends within one. When stdin ends, so does the worker: it never outlives its
parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, Protocol

from tokenary.core.errors import TokenaryError
from tokenary.serve.protocol import Done, Event, Failed, Job, pack, unpack

#: Seconds for the step under way, once the parent is gone.
_LAST_STEP = 10.0


@dataclass(frozen=True)
class Ready:
    """The worker can take jobs.

    Parameters
    ----------
    kind : str
        Of the model: see `LM.kind`.
    context_length, vocab_size : int
        Of the model.
    fingerprint : str
        sha256 of the weights.
    """

    kind: str
    context_length: int
    vocab_size: int
    fingerprint: str


@dataclass(frozen=True)
class Refused:
    """The model cannot be loaded, now or later.

    Parameters
    ----------
    message : str
        For the operator.
    """

    message: str


class Runs(Protocol):
    """What the worker asks of an engine."""

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""

    def submit(self, job: Job) -> None:
        """Take a job; raises a `TokenaryError` for one that cannot be done."""

    def cancel(self, id: str) -> None:
        """End a job; unknown ones are nothing to it."""

    def step(self) -> Iterable[Event]:
        """Run one pass; return what came of it."""


def pack_job(job: Job) -> bytes:
    """Return the line that hands a job to the worker."""
    return json.dumps({"job": asdict(job)}).encode() + b"\n"


def pack_cancel(id: str) -> bytes:
    """Return the line that ends a job."""
    return json.dumps({"cancel": id}).encode() + b"\n"


def read_line(line: bytes) -> Sequence[Event | Ready | Refused]:
    """Return what the worker says: of itself, or what a step brought."""
    given = json.loads(line)
    if isinstance(given, list):
        return unpack(given)
    return [Ready(**given["ready"]) if "ready" in given else Refused(given["refused"])]


def make_engine(factory: str, options: dict[str, Any]) -> tuple[Runs, Ready]:
    """Call the function that ``module:function`` names; raises what it raises."""
    module, _, function = factory.partition(":")
    made: tuple[Runs, Ready] = getattr(importlib.import_module(module), function)(**options)
    return made


def load_engine(model: str, dtype: str = "auto", threads: int | None = None, **options: Any) -> tuple[Runs, Ready]:
    """Load a model and make its engine; the options are those of `EngineOptions`."""
    import torch

    from tokenary.run import load
    from tokenary.serve.engine import Engine, EngineOptions

    if threads is not None:
        torch.set_num_threads(threads)
    lm = load(model, dtype=dtype)
    return Engine(lm, EngineOptions(**options)), Ready(lm.kind, lm.context_length, lm.vocab_size, lm.fingerprint)


def location(error: BaseException) -> str:
    """Say what was raised and where, without its message, which may hold a part of a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


class Worker:
    """The loop between the pipes.

    Parameters
    ----------
    engine : Runs
        Does the work.
    out : binary file
        Takes the events.
    """

    def __init__(self, engine: Runs, out: IO[bytes]) -> None:
        self.engine, self._out = engine, out
        self._lines: queue.Queue[bytes] = queue.Queue()  # its parent bounds the jobs
        self._running: set[str] = set()

    def read(self, source: IO[bytes]) -> None:
        """Take lines until the source ends."""
        for line in source:
            self.hand(line)
        self.hand(b"")

    def hand(self, line: bytes) -> None:
        """Take a line, from any thread; an empty one is the end."""
        self._lines.put(line)

    def run(self) -> None:
        """Work until the source has ended."""
        while self._take():
            self._tell(self.engine.step())

    def fail(self, error: BaseException) -> None:
        """Tell all who wait that there was a defect."""
        self._tell([Failed(id, 500, f"a defect of the server: {type(error).__name__}") for id in self._running])

    def _take(self) -> bool:
        """Take all messages, and wait for one where there is nothing else to do; False at the end."""
        while True:
            try:
                line = self._lines.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if not line:
                return False
            given = json.loads(line)
            if "cancel" in given:
                self.engine.cancel(given["cancel"])
                if self.engine.idle:  # what it says of it comes with the next step
                    return True
            else:
                self._submit(Job(**given["job"]))

    def _submit(self, job: Job) -> None:
        self._running.add(job.id)
        try:
            self.engine.submit(job)
        except TokenaryError as error:
            self._tell([Failed(job.id, 422, " ".join(str(error).split()))])

    def _tell(self, events: Iterable[Event]) -> None:
        told = list(events)
        self._running -= {event.id for event in told if isinstance(event, (Done, Failed))}
        if told:
            self._out.write(pack(told))
            self._out.flush()


def main(factory: str, options: str) -> int:
    """Run a worker on stdin and stdout; return the exit code."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not get between the events
    for name in ("SIGINT", "SIGTERM"):  # a terminal's Ctrl-C reaches all; the parent says when to end
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        engine, ready = make_engine(factory, json.loads(options))
    except TokenaryError as error:
        out.write(json.dumps({"refused": " ".join(str(error).split())}).encode() + b"\n")
        out.close()
        return 2
    worker = Worker(engine, out)

    def read() -> None:
        worker.read(sys.stdin.buffer)
        time.sleep(_LAST_STEP)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    try:
        out.write(json.dumps({"ready": asdict(ready)}).encode() + b"\n")
        out.flush()
        worker.run()
    except BrokenPipeError:  # the parent is gone
        return 1
    except Exception as error:
        print(f"tokenary: the worker ends: {location(error)}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            worker.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # not waiting for the thread that reads, nor for what libraries tidy up
