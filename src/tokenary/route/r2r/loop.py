"""The mixed loop: the small model proposes each token, the large one overrules where the router says so."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.decoding import Decoding, Emission
from tokenary.core.tree import TokenTree
from tokenary.hf.strategy import Task
from tokenary.hf.target import Target, attached

Score = Callable[[Tensor, Tensor, list[int], list[tuple[int, int]]], Tensor]


class Small:
    """The small model over a batch; keeps logits (B, V) and last hidden states (B, d) after its newest token."""

    logits: Tensor
    hidden_states: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        self.target = Target(model)
        self._seen: list[Tensor] = []

    def reading(self, prompts: Sequence[Sequence[int]]) -> Generator[list[Emission], None, None]:
        """Read the prompts as `Target.reading` does."""
        hook = self.target.model.base_model.register_forward_hook(self._see)
        try:
            self.logits = yield from self.target.reading(prompts)
        finally:
            hook.remove()
        hidden = torch.cat(self._seen, dim=1)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
        self.hidden_states = hidden[torch.arange(len(prompts), device=hidden.device), ends]  # (B, d)

    def _see(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._seen.append(output.last_hidden_state)

    def read(self, tokens: Sequence[int]) -> None:
        """Read one token a row."""
        self._seen.clear()
        hook = self.target.model.base_model.register_forward_hook(self._see)
        try:
            self.logits = self.target.score(TokenTree.roots(tokens))[:, 0]
        finally:
            hook.remove()
        self.hidden_states = self._seen[0][:, 0]
        self.target.commit([[0]] * len(tokens))

    def select_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self.target.select_rows(rows)
        self.logits, self.hidden_states = self.logits[list(rows)], self.hidden_states[list(rows)]


def catch_up(large: Target, ids: Sequence[int], n_prompt: int) -> Generator[list[Emission], None, Tensor]:
    """Let the large model read, in one pass, what was written since it was last called; return the logits (1, V) after.

    A long prompt is read as `Target.reading` does.

    Parameters
    ----------
    large : Target
        Over this one sequence; it may have read nothing yet.
    ids : sequence of int
        Prompt and new tokens; at least one is new since the last call, the first call apart.
    n_prompt : int
        How many of them are the prompt: policies of the cache see it as one.
    """
    logits = torch.empty(0)
    if not large.lengths:
        logits = yield from large.reading([ids[:n_prompt]])
    while (start := large.lengths[0]) < len(ids):
        room = large.room(0)  # a policy may want to choose in between
        stop = len(ids) if room is None else min(len(ids), start + max(room, 1))
        logits = large.forward(torch.tensor([ids[start:stop]]), torch.arange(start, stop)[None])[:, -1]
        large.commit([range(stop - start)])
    return logits


class Gate:
    """Says of one sequence, token by token, whether the large model writes.

    Parameters
    ----------
    threshold : float or None
        Scores from here on are routed. None: those in the upper `share` of the sequence's own scores so far.
    share : float
        Wanted share of the large model, above 0 and below 1.
    """

    def __init__(self, threshold: float | None, share: float = 0.0) -> None:
        self.threshold, self.share = threshold, share
        self.past: list[float] = []

    def __call__(self, score: float) -> bool:
        """Decide."""
        if self.threshold is not None:
            return score >= self.threshold
        rank = bisect_left(self.past, score)
        routed = rank >= (1 - self.share) * len(self.past)
        insort(self.past, score)
        return routed


class Mixed:
    """The loop of R2R; see `Running`.

    A trace's passes are those of the large model, the prompt's own apart, each with the tokens that it caught up with.
    ``from_draft`` is True where the small model wrote.

    Parameters
    ----------
    task : Task
        What to write; its model is the large one.
    small : PreTrainedModel
        With the same tokens.
    score : callable
        ``score(hidden_states (n, d), logits (n, V), tokens, names)`` gives (n,): how much each token needs the large
        model.
    gate : callable
        Makes the `Gate` of a sequence.
    """

    def __init__(self, task: Task, small: PreTrainedModel, score: Score, gate: Callable[[], Gate]) -> None:
        self.task, self.model, self.score, self.gate = task, small, score, gate
        self.sequences = [Decoding(row, list(prompt), len(prompt)) for row, prompt in enumerate(task.prompts)]
        self.branches: list[list[Decoding]] = [[] for _ in task.prompts]
        self.peak_bytes = 0

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Emission]]:
        task, live = self.task, list(self.sequences)
        gates = [self.gate() for _ in live]
        larges = [task.target() for _ in live]
        with attached(self.model):
            small = Small(self.model)
            yield from small.reading([sequence.ids for sequence in live])
            while True:
                rows = [sequence.index for sequence in live]
                tokens = task.sampler(small.logits, rows, [sequence.ids for sequence in live])
                names = [(task.sampler.first_row + s.index, len(s.ids)) for s in live]
                scores = self.score(small.hidden_states, small.logits, tokens, names).tolist()
                routed = [gates[row](score) for row, score in zip(rows, scores, strict=True)]
                for at, sequence in enumerate(live):
                    if routed[at]:
                        tokens[at] = yield from self._overrule(larges[sequence.index], sequence)
                held = sum(larges[row].nbytes for row in rows if larges[row].lengths)
                self.peak_bytes = max(self.peak_bytes, small.target.nbytes + held)
                yield [
                    self._emit(sequence, token, not by_large)
                    for sequence, token, by_large in zip(live, tokens, routed, strict=True)
                ]
                kept = [at for at, sequence in enumerate(live) if sequence.finish is None]
                if not kept:
                    return
                if len(kept) < len(live):
                    small.select_rows(kept)
                    live = [live[at] for at in kept]
                small.read([sequence.ids[-1] for sequence in live])

    def _overrule(self, large: Target, sequence: Decoding) -> Generator[list[Emission], None, int]:
        """Let the large model catch up with a sequence and choose its next token."""
        behind = len(sequence.ids) - (large.lengths[0] if large.lengths else sequence.n_prompt)
        logits = yield from catch_up(large, sequence.ids, sequence.n_prompt)
        if behind:  # else the prompt's own pass gave the token
            sequence.trace.per_pass.append((behind - 1, behind - 1))
        return self.task.sampler(logits, [sequence.index], [sequence.ids])[0]

    def _emit(self, sequence: Decoding, token: int, by_small: bool) -> Emission:
        task = self.task
        sequence.ids.append(token)
        sequence.trace.from_draft.append(by_small)
        if token in task.end_tokens or (task.stops is not None and task.stops(sequence.index, sequence.ids)):
            sequence.finish = "stop"
        elif len(sequence.new_ids) >= task.max_new_tokens:
            sequence.finish = "length"
        return Emission(sequence.index, [token], [by_small], sequence.finish)
