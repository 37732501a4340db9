"""The lane of the ordinary loop: jobs of one recipe that join a running batch and leave it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenary.core.decoding import Decoding, Emission
from tokenary.core.errors import InputError
from tokenary.core.sampling import Chooser
from tokenary.decode.base import Loop
from tokenary.hf.cache import TokenCache
from tokenary.hf.strategy import Strategy, Task
from tokenary.models import LM
from tokenary.run import task_of
from tokenary.serve.engine.choosing import Choosers, Schemas
from tokenary.serve.engine.failures import failed
from tokenary.serve.engine.reading import Newcomer, Reading
from tokenary.serve.engine.work import Clock, Work
from tokenary.serve.protocol import Event, TokenLogprob


class BatchLane:
    """Jobs of one recipe in one batch: they join when their prompt is read, and leave when they end.

    Parameters
    ----------
    lm : LM
        The model.
    methods : mapping
        Those of the recipe, by slot; none has a loop of its own.
    schemas : Schemas
        Of the engine.
    clock : callable
        Seconds.
    max_batch, piece : int
        As in `EngineOptions`.
    """

    def __init__(
        self, lm: LM, methods: Mapping[str, Any], schemas: Schemas, clock: Clock, max_batch: int, piece: int
    ) -> None:
        self._lm, self._methods, self._schemas, self._clock = lm, methods, schemas, clock
        self._max_batch, self._piece = max_batch, piece
        self.works: list[Work] = []
        self.spent = 0.0
        self._choosers = Choosers()
        self._readings: deque[Reading] = deque()
        self._live: dict[int, Work] = {}  # by the index of the sequence
        self._loop: Loop | None = None
        self._indices = itertools.count()

    @property
    def has_room(self) -> bool:
        """Whether one more job may begin."""
        return len(self.works) < self._max_batch

    def begin(self, work: Work) -> None:
        """Begin a job: its prompt is read in the steps to come.

        Raises
        ------
        TokenaryError
            If it does not fit into the model's context, or its schema is none.
        """
        job, index = work.job, next(self._indices)
        total = len(job.prompt) + job.max_new_tokens
        if total > self._lm.context_length and not getattr(self._methods.get("read"), "extends_context", False):
            raise InputError(f"prompt and new tokens are {total}; the context has {self._lm.context_length}")
        task = task_of(self._lm, self._methods, [job.prompt], job.max_new_tokens, work.sampler)
        chooser = self._chooser(work, task)
        newcomer = Newcomer(work, Decoding(index, list(job.prompt), len(job.prompt), work.trace), task)
        if self._readings and self._readings[-1].takes(newcomer, self._piece):
            self._readings[-1].newcomers.append(newcomer)
        else:
            self._readings.append(Reading([newcomer]))
        self._choosers.of[index] = chooser
        self.works.append(work)

    def _chooser(self, work: Work, task: Task) -> Chooser:
        """Return what chooses the tokens of a job: a method, its schema, or its sampler."""
        strategy = next((method for method in self._methods.values() if isinstance(method, Strategy)), None)
        if strategy is not None and work.job.schema is not None:
            raise InputError(f"{strategy.card.slug} and a schema do not compose: both choose the tokens")
        if strategy is not None:
            return strategy.chooser(task)
        return work.sampler if work.job.schema is None else self._schemas.chooser(work.job.schema, task)

    def step(self) -> list[Event]:
        """Run a pass of those who write, and read a piece: of one long prompt, or of several short ones, in turns."""
        events: list[Event] = []
        if self._loop is not None:
            emissions = self._loop.step()
            self._loop.calibrate()
            events += self._report(emissions)
        if self._readings:
            reading = self._readings.popleft()
            try:
                logits = reading.step(self._piece)
            except Exception as error:
                return events + self._fail(reading, error)
            if logits is None:
                self._readings.append(reading)
            else:
                events += self._join(reading, logits)
        return events

    def _fail(self, reading: Reading, error: Exception) -> list[Event]:
        """Fail a newcomer; where it was not alone, nobody knows whose fault it is, and each is read by itself."""
        if len(reading.newcomers) > 1:
            self._readings.extend(Reading([newcomer]) for newcomer in reading.newcomers)
            return []
        (newcomer,) = reading.newcomers
        self._forget(newcomer.work, newcomer.sequence.index)
        return [failed(newcomer.work, error)]

    def _join(self, reading: Reading, logits: Tensor) -> list[Event]:
        """Take newcomers into the batch, and report their first tokens."""
        lm = self._lm
        if self._loop is None:
            draft = self._methods.get("draft")
            self._loop = Loop(
                reading.target, [], self._choosers, 0, lm.eos_token_ids, draft, self._stops, told=self._note
            )
        for newcomer in reading.newcomers:
            index = newcomer.sequence.index
            self._live[index] = newcomer.work
            self._loop.limits[index] = newcomer.work.job.max_new_tokens
        return self._report(self._loop.join(reading.target, logits, [one.sequence for one in reading.newcomers]))

    def _stops(self, index: int, ids: Sequence[int]) -> bool:
        return self._live[index].text.add(ids[-1])

    def _note(self, index: int, logits: Tensor, nodes: Sequence[int], tokens: Sequence[int]) -> None:
        """Note the log-probabilities of chosen tokens, where a job asks for them."""
        work = self._live[index]
        if work.job.logprobs is not None:
            log_probs = logits[list(nodes)].float().log_softmax(-1)
            best = log_probs.topk(min(work.job.logprobs, log_probs.shape[-1]))
            own = log_probs[range(len(tokens)), list(tokens)].tolist()
            tops = (
                list(zip(ids, values, strict=True))
                for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            )
            work.logprobs = [TokenLogprob(value, top) for value, top in zip(own, tops, strict=True)]

    def _report(self, emissions: Sequence[Emission]) -> list[Event]:
        """Tell of new tokens, and of jobs that ended or failed."""
        assert self._loop is not None
        loop, now, events = self._loop, self._clock(), list[Event]()
        self._weigh(loop)
        rows = {sequence.index: row for row, sequence in enumerate(loop.batch)}
        for emission in emissions:
            index, row = emission.row, rows[emission.row]
            work, error = self._live[index], self._choosers.failed.pop(index, None)
            if error is not None:
                events.append(failed(work, error))
                self._leave(work, loop.batch[row])
                continue
            held = shares_held(loop.target.cache, row, len(loop.batch[row].ids)) if work.job.watch else None
            last = emission.finish is not None
            events.append(work.progress(emission.token_ids, emission.from_draft, last, now, held))
            if emission.finish is not None:
                events.append(work.done(emission.finish, now))
                self._leave(work, loop.batch[row])
        return events

    def _weigh(self, loop: Loop) -> None:
        """Give each job its share of the bytes that the batch holds, by the tokens that it holds in all layers."""
        held = [sum(counts) for counts in zip(*(layer.held for layer in loop.target.cache.token_layers), strict=True)]
        total = loop.target.nbytes
        for sequence, count in zip(loop.batch, held, strict=True):
            work = self._live.get(sequence.index)
            if work is not None:
                work.kv_bytes = max(work.kv_bytes, round(total * count / sum(held)))

    def drop(self, work: Work) -> None:
        """Forget a job that ended from outside; its row leaves before the next pass."""
        for reading in self._readings:
            for newcomer in reading.newcomers:
                if newcomer.work is work:
                    self._forget(work, newcomer.sequence.index)
                    reading.newcomers.remove(newcomer)
                    if not reading.newcomers:
                        self._readings.remove(reading)
                    return
        assert self._loop is not None
        self._leave(work, next(s for s in self._loop.batch if self._live.get(s.index) is work))

    def _leave(self, work: Work, sequence: Decoding) -> None:
        """Take a job out of the batch; with the last one the batch goes."""
        assert self._loop is not None
        if sequence.finish is None:
            self._loop.cancel(sequence)
        del self._live[sequence.index], self._loop.limits[sequence.index]
        self._forget(work, sequence.index)
        if not self._live:
            self._loop = None

    def _forget(self, work: Work, index: int) -> None:
        self.works.remove(work)
        del self._choosers.of[index]


def shares_held(cache: TokenCache, row: int, length: int) -> list[float]:
    """Return for each of `length` positions of a sequence the share of all layers and key heads that still hold it.

    A token that was not read yet is on its way to all of them.
    """
    counts, heads, read = torch.zeros(length), 0, 0
    for layer in cache.token_layers:
        assert layer.storage is not None
        held, read = layer.held[row], layer.committed[row]
        heads += layer.storage.shape[2]
        if layer.positions is None:
            counts[:held] += layer.storage.shape[2]
        else:
            at = layer.positions[row, :, :held].flatten().cpu()
            counts += torch.bincount(at, minlength=length)[:length]
    counts[read:] = heads
    return (counts / heads).tolist()
