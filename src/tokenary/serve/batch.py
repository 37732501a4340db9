"""Offline jobs: a file of requests to a file of answers, written as the server writes them.

Each line of the one gives one line of the other, in the order in which they end. What an answer is depends on its line
alone. A run that was broken off goes on where it stood: answers are appended whole, and one that stands is not written
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from tokenary import models
from tokenary.core.errors import InputError
from tokenary.core.files import cache_folder
from tokenary.serve import recipes
from tokenary.serve.base_pool import BasePool
from tokenary.serve.batch_files import CHAT, Row, read_rows, take_up
from tokenary.serve.errors import ApiError, fault
from tokenary.serve.local_pool import LocalPool
from tokenary.serve.metrics import Metrics
from tokenary.serve.orders import Desk
from tokenary.serve.schemas import ChatRequest, CompletionRequest
from tokenary.serve.settings import Settings
from tokenary.serve.text import Text
from tokenary.serve.writing import Writer

_TRIES = 3  # for a line whose worker died
_PATIENCE = 600.0  # seconds for a worker to come back


@dataclass
class Summary:
    """What a run did.

    Parameters
    ----------
    lines : int
        Of the file of requests, blank ones not counted.
    stood : int
        Answers that stood already.
    answered, refused : int
        Answers and errors that this run wrote.
    prompt_tokens, new_tokens, passes : int
        Of its answers.
    seconds : float
        From the model being there to the last answer.
    """

    lines: int = 0
    stood: int = 0
    answered: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0


class Batch:
    """A run over one file.

    Parameters
    ----------
    settings : Settings
        As a server's; the deadline is each line's own.
    pool : BasePool
        Writes.
    text : Text
        The tokenizer.
    source, out : Path
        Requests and answers.
    recipe : str
        For lines that name none.
    at_once : int
        Lines under way at a time.
    progress : callable, optional
        Called with the number of lines to do, and then with 1 for each that is done.

    Attributes
    ----------
    summary : Summary
        So far.
    """

    def __init__(
        self, settings: Settings, pool: BasePool, text: Text, source: Path, out: Path, *, recipe: str = "",
        at_once: int = 16, progress: Callable[[int], None] = lambda n: None,
    ) -> None:  # fmt: skip
        self._settings, self._pool, self._text = settings, pool, text
        self._source, self._out, self._recipe = source, out, recipe
        self._at_once, self._progress = at_once, progress
        self._desk = Desk(settings, text, pool)
        self._writer = Writer(settings, text, pool, Metrics(pool))
        self._again = asyncio.Lock()
        self.summary = Summary()

    async def run(self) -> Summary:
        """Write all answers that do not stand yet.

        Raises
        ------
        InputError
            If a file cannot be used, or no model writes.
        """
        from filelock import FileLock, Timeout

        locks = cache_folder() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(self._out.resolve()).encode()).hexdigest()[:16]
        try:
            with FileLock(locks / f"batch-{name}.lock", timeout=0):
                return await self._run()
        except Timeout:
            raise InputError(f"another run writes {self._out}") from None

    async def _run(self) -> Summary:
        if self._out.resolve() == self._source.resolve():
            raise InputError("requests and answers cannot be one file")
        stood = take_up(self._out)
        self._count(stood)
        if self.summary.lines == self.summary.stood:
            return self.summary
        with _appending(self._out) as out:
            try:
                await self._text.start()  # before the engine's thread, since both import transformers
                await self._pool.start()
                try:
                    await self._write_all(out, stood)
                finally:
                    await self._pool.stop()
            finally:
                self._text.stop()
        return self.summary

    def _rows(self) -> Iterator[Row]:
        """Read the requests; their ids also tell of the options that change the answers."""
        given = self._settings
        salt = json.dumps([given.model, given.name, given.max_new_tokens, self._recipe])
        return read_rows(self._source, salt, given.max_body)

    def _count(self, stood: set[str]) -> None:
        summary = self.summary
        for row in self._rows():
            summary.lines += 1
            summary.stood += row.id in stood
        if summary.stood != len(stood):
            raise InputError(
                f"{self._out} has answers to other lines or other options than those of {self._source.name}; "
                "name another file with --out"
            )
        self._progress(summary.lines - summary.stood)

    async def _write_all(self, out: IO[bytes], stood: set[str]) -> None:
        """Take line after line, some at a time, until all are done or no model can write."""
        await self._ready()
        try:
            recipes.parse(self._recipe, self._desk.info.kind)
        except ApiError as error:
            raise InputError(error.message) from None
        began, rows = time.monotonic(), (row for row in self._rows() if row.id not in stood)

        async def take() -> None:
            for row in rows:
                out.write(await self._line(row))
                out.flush()
                self._progress(1)

        takers = asyncio.gather(*(take() for _ in range(self._at_once)))
        try:
            either: set[asyncio.Future[Any]] = {takers, self._pool.refused}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not takers.done():
                raise InputError(self._pool.refused.result())
            takers.result()
        finally:
            takers.cancel()
            await asyncio.gather(takers, return_exceptions=True)
            self.summary.seconds = time.monotonic() - began

    async def _line(self, row: Row) -> bytes:
        """Return the answer to a line, or what is wrong with it."""
        response, error = None, None
        try:
            answer = await self._answer(row)
            body = json.loads(answer.json_text())
            response = {"status_code": 200, "request_id": body["id"], "body": body}
            self._note(answer)
        except ApiError as refused:
            error = {"status_code": refused.status, **refused.body()["error"]}
            self.summary.refused += 1
        made = {"id": row.id, "custom_id": row.custom_id, "response": response, "error": error}
        return json.dumps(made).encode() + b"\n"

    async def _answer(self, row: Row) -> Any:
        """Write an answer; where the worker dies, again, one such line at a time."""
        if row.fault is not None:
            raise row.fault
        body = self._checked(row)
        for tried in range(_TRIES):
            try:
                async with self._again if tried else contextlib.nullcontext():
                    return await self._write(body)
            except ApiError as error:
                if error.status not in (500, 503) or tried == _TRIES - 1:
                    raise
        raise AssertionError

    async def _write(self, body: ChatRequest | CompletionRequest) -> Any:
        await self._ready()
        chat = isinstance(body, ChatRequest)
        order = await (self._desk.chat(body, None) if chat else self._desk.completion(body, None))  # type: ignore
        return await self._writer.whole(order)

    def _checked(self, row: Row) -> ChatRequest | CompletionRequest:
        """Check a body as the server does."""
        body, ours = dict(row.body), row.body.get("tokenary")
        silent = body.get("model") in (None, self._desk.name) and isinstance(ours, dict | None)
        if self._recipe and silent and (ours or {}).get("recipe") is None:
            body["tokenary"] = {**(ours or {}), "recipe": self._recipe}
        try:
            made = (ChatRequest if row.url == CHAT else CompletionRequest).model_validate(body)
        except ValidationError as error:
            raise fault([{**one, "loc": ("body", *one["loc"])} for one in error.errors()], body) from None
        if made.stream:
            raise ApiError(422, "a batch does not stream", "stream")
        return made

    async def _ready(self) -> None:
        """Wait until the pool can write."""
        until = time.monotonic() + _PATIENCE
        while self._pool.state != "ready":
            if self._pool.refused.done():
                raise InputError(self._pool.refused.result())
            if self._pool.info is not None and time.monotonic() > until:
                raise InputError(f"no worker came back within {_PATIENCE:g} s; the answers so far stand")
            await asyncio.sleep(0.05)

    def _note(self, answer: Any) -> None:
        self.summary.answered += 1
        self.summary.prompt_tokens += answer.usage.prompt_tokens
        self.summary.new_tokens += answer.usage.completion_tokens
        self.summary.passes += answer.usage.tokenary.passes


def _appending(out: Path) -> IO[bytes]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.open("ab")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None


def run_batch(settings: Settings, source: Path, out: Path, **options: Any) -> Summary:
    """Run a batch with the engine that the settings name: in this process, or in replicas on Ray Serve.

    Parameters
    ----------
    settings, source, out, **options
        As `Batch` takes them.

    Raises
    ------
    TokenaryError
        As `Batch.run` does, or if Ray is not installed.
    """
    pool: BasePool
    if settings.backend == "ray":
        from tokenary.serve.ray_pool import RayPool

        pool = RayPool(settings)
    else:
        pool = LocalPool(settings)
    settings = replace(settings, max_wait=settings.deadline)  # nobody stands there and waits
    text = Text(lambda: models.load_tokenizer(settings.model), settings.max_prompt_bytes)
    return asyncio.run(Batch(settings, pool, text, source, out, **options).run())
