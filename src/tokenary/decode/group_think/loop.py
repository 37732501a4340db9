"""The loop of Group Think: several threads a prompt as pending rows of one cache row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenary.core.decoding import Decoding, Emission, Trace
from tokenary.hf.strategy import Task

PROMPT, PADDING = -1, -2  # in place of a thread's number
EVER, NEVER = -(1 << 60), 1 << 60  # ticks before and after all others
MERGING = 1 << 50  # ticks from here on belong to the merged answer, which is late enough to see every thread


def sees(
    threads: np.ndarray, ticks: np.ndarray, key_threads: np.ndarray, key_ticks: np.ndarray, lag: int
) -> np.ndarray:
    """Whether each query token may look at each key token.

    A thread sees all that it wrote itself up to now, and what others wrote at least `lag` ticks ago.

    Parameters
    ----------
    threads, ticks : np.ndarray
        Thread of each query token and when it was written, int64, (..., W).
    key_threads, key_ticks : np.ndarray
        The same of the keys, (..., N).
    lag : int
        At least 0; at 0, tokens of the same tick see each other.

    Returns
    -------
    np.ndarray
        bool, (..., W, N).
    """
    age = ticks[..., :, None] - key_ticks[..., None, :]
    own = threads[..., :, None] == key_threads[..., None, :]
    return (age >= lag) | (own & (age >= 0))


@dataclass(frozen=True)
class Layout:
    """How threads lie in position and time.

    Parameters
    ----------
    budget : int
        Slots of a thread, K.
    stride : int
        Ticks of a step: 1 where all threads write at once, N where they take turns.
    lag : int
        Ticks after which a token becomes visible to other threads.
    """

    budget: int
    stride: int
    lag: int


@dataclass
class Group:
    """One prompt, the threads that answer it, and what of them is in its cache row.

    Parameters
    ----------
    answer : Decoding
        The answer.
    threads : list of Decoding
        The thinkers; behind them the merged answer, with the words that ask for it, once it is being written.
    fed : list of int
        Tokens of each thread that the model has read.
    slots : list of (int, int)
        Thread and tick of every token in the cache.
    """

    answer: Decoding
    threads: list[Decoding]
    fed: list[int]
    slots: list[tuple[int, int]]


class GroupLoop:
    """Writes the threads of some prompts; see `GroupThink`. Iterate to run it a pass at a time.

    Parameters
    ----------
    task : Task
        What to do; its prompts are not used.
    prompts : sequence of sequence of int
        Token ids, system text included.
    headers : sequence of sequence of int
        Tokens that each thread starts with.
    merge : sequence of int or None
        Tokens that ask for the merged answer; None for none.
    layout : Layout
        Slots and time.
    first_ends : bool
        Whether the first thinker that is done ends all.
    """

    def __init__(
        self,
        task: Task,
        prompts: Sequence[list[int]],
        headers: Sequence[list[int]],
        merge: list[int] | None,
        layout: Layout,
        first_ends: bool,
    ) -> None:
        self.task, self.merge, self.layout, self.first_ends = task, merge, layout, first_ends
        self.thinkers, self.target, self.end_tokens = len(headers), task.target(), frozenset(task.end_tokens)
        self.sequences = [Decoding(row, list(prompt), len(prompt)) for row, prompt in enumerate(prompts)]
        self.branches = [
            [Decoding(s.index, s.ids + header, s.n_prompt, Trace(given=len(header))) for header in headers]
            for s in self.sequences
        ]
        self.peak_bytes = 0

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Emission]]:
        groups = [
            Group(answer, list(branches), [0] * self.thinkers, [(PROMPT, EVER)] * answer.n_prompt)
            for answer, branches in zip(self.sequences, self.branches, strict=True)
        ]
        logits = yield from self.target.reading([group.answer.ids for group in groups])
        # A thread without a header starts from the prompt's last token.
        picks = [(b.index, n) for branches in self.branches for n, b in enumerate(branches) if not b.new_ids]
        if picks:
            yield self._extend(groups, picks, logits[[row for row, _ in picks]])
        while groups := self._drop_finished(groups):
            yield self._pass(groups)

    def _tick(self, group: Group, thread: int, at: int) -> int:
        """When token `at` of a thread was written; headers end together, a tick before the first chosen token."""
        step = at - group.threads[thread].trace.given
        if thread == self.thinkers:
            return MERGING + step
        return step if self.layout.stride == 1 else step * self.layout.stride + thread

    def _next(self, group: Group) -> list[tuple[int, int, int]]:
        """Tokens that the next pass feeds, as (tick, thread, place in the thread)."""
        waiting = sorted(
            (self._tick(group, thread, at), thread, at)
            for thread, written in enumerate(group.threads)
            for at in range(group.fed[thread], len(written.ids) - written.n_prompt)
        )
        forced = any(at < group.threads[thread].trace.given for _, thread, at in waiting)  # known tokens go in together
        return waiting if forced or self.layout.stride == 1 else waiting[:1]

    def _pass(self, groups: list[Group]) -> list[Emission]:
        """Feed the newest tokens of all groups once, commit them, and choose the tokens that follow."""
        fed = [self._next(group) for group in groups]
        shape = (len(groups), max(map(len, fed)))
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        threads, ticks = np.full(shape, PADDING), np.full(shape, NEVER)
        for row, (group, tokens) in enumerate(zip(groups, fed, strict=True)):
            for column, (tick, thread, at) in enumerate(tokens):
                start = group.answer.n_prompt
                ids[row, column] = group.threads[thread].ids[start + at]
                positions[row, column] = start + thread * self.layout.budget + at
                threads[row, column], ticks[row, column] = thread, tick
        visible = None
        if self.layout.lag:  # else all that was written before is visible
            longest = max(len(group.slots) for group in groups)
            slots = np.array([group.slots + [(PADDING, NEVER)] * (longest - len(group.slots)) for group in groups])
            visible = torch.from_numpy(sees(threads, ticks, slots[..., 0], slots[..., 1], self.layout.lag))
        ancestors = torch.from_numpy(sees(threads, ticks, threads, ticks, self.layout.lag))
        logits = self.target.forward(torch.from_numpy(ids), torch.from_numpy(positions), ancestors, visible)
        self.target.commit([range(len(tokens)) for tokens in fed])
        self.peak_bytes = max(self.peak_bytes, self.target.nbytes)
        picks, columns = [], []
        for row, (group, tokens) in enumerate(zip(groups, fed, strict=True)):
            group.answer.trace.per_pass.append((0, 0))
            group.slots += [(thread, tick) for tick, thread, _ in tokens]
            for column, (_, thread, at) in enumerate(tokens):
                group.fed[thread] += 1
                written = group.threads[thread]
                if written.finish is None and at == len(written.ids) - written.n_prompt - 1:
                    picks.append((row, thread))
                    columns.append(column)
        return self._extend(groups, picks, logits[[row for row, _ in picks], columns])

    def _extend(self, groups: list[Group], picks: list[tuple[int, int]], logits: Tensor) -> list[Emission]:
        """Choose the next token of the threads `picks`, (row, thread), from logits (n, V), and end what ends."""
        sampler, emissions = self.task.sampler, []
        # Every thinker draws from a row of random numbers of its own, the same whatever the batch.
        rows = [
            (sampler.first_row + groups[row].answer.index) * self.thinkers + thread - sampler.first_row
            for row, thread in picks
        ]
        tokens = sampler(logits, rows, [groups[row].threads[thread].ids for row, thread in picks])
        for at, (row, thread) in enumerate(picks):
            merging = thread == self.thinkers
            emissions.append(self._append(groups[row], thread, int(logits[at].argmax()) if merging else tokens[at]))
        for group in groups:
            emissions += self._end(group)
        return emissions

    def _append(self, group: Group, thread: int, token: int) -> Emission:
        """Append a token to a thread, and say whether the thread ends with it."""
        written, answer = group.threads[thread], group.answer
        written.ids.append(token)
        new, given = written.new_ids, written.trace.given
        merging = thread == self.thinkers
        if token in self.end_tokens:
            written.finish = "stop"
            group.fed[thread] = len(new)  # it ends this thread, not the text that the others read
        elif self.task.stops is not None and self.task.stops(answer.index, answer.ids[: answer.n_prompt] + new[given:]):
            written.finish = "stop"
        elif len(new) == self.layout.budget + given * merging:
            written.finish = "length"
        if merging:
            answer.ids.append(token)
            answer.trace.from_draft.append(False)
            answer.finish = written.finish
            return Emission(answer.index, [token], [False], written.finish)
        shown = new if len(new) == given + 1 else [token]  # the header comes with the first token
        return Emission(answer.index, shown, [False] * len(shown), written.finish, branch=thread)

    def _end(self, group: Group) -> list[Emission]:
        """End the thinkers if one answered for all, and make the answer once all ended."""
        answer, thinkers = group.answer, group.threads[: self.thinkers]
        emissions = []
        if self.first_ends and any(thinker.finish == "stop" for thinker in thinkers):
            for branch, thinker in enumerate(thinkers):
                if thinker.finish is None:
                    thinker.finish = "pruned"
                    emissions.append(Emission(answer.index, [], [], "pruned", branch=branch))
        if len(group.threads) > self.thinkers or any(thinker.finish is None for thinker in thinkers):
            return emissions
        if self.merge is not None:
            asked = Trace(given=len(self.merge))
            group.threads.append(Decoding(answer.index, answer.ids + self.merge, answer.n_prompt, asked))
            group.fed.append(0)
            return emissions
        joined = [token for thinker in thinkers for token in thinker.new_ids]
        answer.ids += joined
        answer.trace.from_draft += [False] * len(joined)
        answer.trace.given = sum(thinker.trace.given for thinker in thinkers)
        answer.finish = "length" if any(thinker.finish == "length" for thinker in thinkers) else "stop"
        return [*emissions, Emission(answer.index, joined, [False] * len(joined), answer.finish)]

    def _drop_finished(self, groups: list[Group]) -> list[Group]:
        """Take prompts whose answer is complete out of the batch."""
        rows = [row for row, group in enumerate(groups) if group.answer.finish is None]
        if rows and len(rows) < len(groups):
            self.target.select_rows(rows)
        return [groups[row] for row in rows]
