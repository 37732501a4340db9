"""The loop: all branches of all prompts advance one token a pass, as rows of one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenary.core.decoding import Decoding, Emission, Trace
from tokenary.core.sampling import invert
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.decode.latr.likeness import is_word
from tokenary.hf.strategy import Task

if TYPE_CHECKING:
    from tokenary.decode.latr import LATR


@dataclass(eq=False)
class Leaf:
    """One branch of a prompt.

    Parameters
    ----------
    group : Group
        The branches of its prompt.
    slot : int
        Which of them it is; the slot of a pruned branch is taken by a later fork.
    text : Decoding
        Its tokens, and the sum of their log-probabilities.
    row : int
        Row of the cache that holds its past.
    in_tree : bool
        Whether it belongs to the tree, or is an independent sample.
    parent : Leaf or None
        What it was forked from.
    birth : int
        New tokens it had then.
    copy_of : int or None
        The slot that its first emission copies, until that was emitted.
    """

    group: Group
    slot: int
    text: Decoding
    row: int
    in_tree: bool = True
    parent: Leaf | None = None
    birth: int = 0
    copy_of: int | None = None
    children: list[Leaf] = field(default_factory=list)

    def emission(self, token_ids: list[int]) -> Emission:
        """Report new tokens, and whose copy this is if that was not reported yet."""
        text, copy_of, self.copy_of = self.text, self.copy_of, None
        drafted = [False] * len(token_ids)
        return Emission(text.index, token_ids, drafted, text.finish, branch=self.slot, copy_of=copy_of)

    def family(self) -> Iterator[Leaf]:
        """Itself and all descendants."""
        yield self
        for child in self.children:
            yield from child.family()


class Group:
    """The branches of one prompt.

    Parameters
    ----------
    answer : Decoding
        The prompt; in the end, the answer.
    branches : list of Decoding
        The text of each slot; filled here.
    capacity, samples : int
        Leaves that the tree may have, and independent samples beside it.
    """

    def __init__(self, answer: Decoding, branches: list[Decoding], capacity: int, samples: int) -> None:
        self.answer, self.branches, self.capacity = answer, branches, capacity
        self.leaves: list[Leaf] = []  # those that were not pruned, finished ones included
        self.growing = capacity > 0
        for in_tree in [True] * self.growing + [False] * samples:
            self._open(Decoding(answer.index, list(answer.ids), answer.n_prompt), answer.index).in_tree = in_tree

    @property
    def tree(self) -> list[Leaf]:
        """The leaves of the tree, the root first."""
        return [leaf for leaf in self.leaves if leaf.in_tree]

    @property
    def done(self) -> bool:
        """Whether every leaf ended and none is missing."""
        return len(self.tree) == self.capacity and all(leaf.text.finish for leaf in self.leaves)

    def fork(self, parent: Leaf) -> Leaf:
        """Open a leaf that starts as a copy of `parent`."""
        old = parent.text
        trace = Trace(list(old.trace.per_pass), list(old.trace.from_draft))
        leaf = self._open(
            Decoding(old.index, list(old.ids), old.n_prompt, trace, old.finish, old.log_weight), parent.row
        )
        leaf.parent, leaf.birth = parent, len(old.new_ids)
        leaf.copy_of = parent.slot if leaf.birth else None  # before its first token, a branch is the prompt
        parent.children.append(leaf)
        return leaf

    def prune(self, leaf: Leaf) -> list[Leaf]:
        """Remove a leaf and its descendants; return them."""
        removed = list(leaf.family())
        for one in removed:
            one.text.finish = "pruned"
        self.leaves = [one for one in self.leaves if one not in removed]
        if leaf.parent is not None:
            leaf.parent.children.remove(leaf)
        return removed

    def _open(self, text: Decoding, row: int) -> Leaf:
        """Take the slot of a pruned branch, or a new one."""
        used = {leaf.slot for leaf in self.leaves}
        slot = next(slot for slot in range(len(used) + 1) if slot not in used)
        self.branches[slot : slot + 1] = [text]
        leaf = Leaf(self, slot, text, row)
        self.leaves.append(leaf)
        return leaf


class Rollouts:
    """The loop of LATR; see `tokenary.core.decoding.Running`."""

    def __init__(self, task: Task, method: LATR) -> None:
        self.task, self.method = task, method
        self.sequences = [Decoding(row, list(prompt), len(prompt)) for row, prompt in enumerate(task.prompts)]
        self.branches: list[list[Decoding]] = [[] for _ in task.prompts]
        self.peak_bytes = 0
        self._ends = frozenset(task.end_tokens)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[Emission]]:
        method = self.method
        groups = [
            Group(answer, branches, method.capacity, method.group - method.capacity)
            for answer, branches in zip(self.sequences, self.branches, strict=True)
        ]
        target = self.task.target()
        logits = yield from target.reading(self.task.prompts)
        step = 0  # new tokens of every leaf that goes on
        while groups:
            emissions = [emission for group in groups for emission in self._leave_tree(group, step)]
            live = [leaf for group in groups for leaf in group.leaves if not leaf.text.finish]
            if live:
                rows = [leaf.row for leaf in live]
                if rows != list(range(len(target.lengths))):
                    target.select_rows(rows)
                    for row, leaf in enumerate(live):
                        leaf.row = row
                self.peak_bytes = max(self.peak_bytes, target.nbytes)
                if step == 0:
                    logits = logits[rows]
                else:
                    logits = target.score(TokenTree.roots([leaf.text.ids[-1] for leaf in live]))[:, 0]
                    target.commit([[0]] * len(live))
                    for text in [leaf.text for leaf in live] + [group.answer for group in groups]:
                        text.trace.per_pass.append((0, 0))
                step += 1
                emissions += self._advance(live, logits, step)
            emissions += [self._answer(group) for group in groups if group.done]
            groups = [group for group in groups if not group.done]
            yield emissions

    def _leave_tree(self, group: Group, step: int) -> list[Emission]:
        """Stop growing a tree that is full and whose branches were all compared; fill it up with copies of the root."""
        if not group.growing:
            return []
        tree, method = group.tree, self.method
        age = step - max(leaf.birth for leaf in tree)
        grown = method.leaves_tree(step / self.task.max_new_tokens, len(tree), age)
        if not (grown or step >= method.tree_steps or all(leaf.text.finish for leaf in tree)):
            return []
        group.growing = False
        copies = [group.fork(tree[0]) for _ in range(group.capacity - len(tree))]
        return [copy.emission([]) for copy in copies if copy.text.finish]

    def _advance(self, live: list[Leaf], logits: Tensor, step: int) -> list[Emission]:
        """Give every leaf its next token, fork and prune; emit copies first, since they copy what was before."""
        log_probs = logits.float().log_softmax(-1)
        best = log_probs.topk(min(self.method.top, log_probs.shape[-1]))
        forks = self._forks(live, best.values.exp(), best.indices)
        forked = {row for row, _ in forks}
        tokens = best.indices[:, 0].tolist()
        drawn = [row for row, leaf in enumerate(live) if row not in forked and self._samples(leaf)]
        if drawn and not self.task.sampler.greedy:
            numbers = [self._number("sample", live[row]) for row in drawn]
            chosen = invert(self.task.sampler.probabilities(logits[drawn]), numbers)
            for row, token in zip(drawn, chosen, strict=True):
                tokens[row] = token
        born = [live[row].group.fork(live[row]) for row, _ in forks]
        leaves, rows = born + live, [row for row, _ in forks] + list(range(len(live)))
        tokens = [int(best.indices[row, rank]) for row, rank in forks] + tokens
        for leaf, token, weight in zip(leaves, tokens, log_probs[rows, tokens].tolist(), strict=True):
            self._write(leaf, token, weight)
        removed = self._prune(leaves, step)
        order = sorted(range(len(leaves)), key=lambda at: leaves[at].copy_of is None)
        emissions = [leaves[at].emission([tokens[at]]) for at in order]
        return emissions + [leaf.emission([]) for leaf in removed if leaf not in leaves]

    def _forks(self, live: list[Leaf], probabilities: Tensor, ids: Tensor) -> list[tuple[int, int]]:
        """Return which rows fork into which of their candidates (n, m), as (row, rank)."""
        wanted = self.method.forks(probabilities).cpu()
        if self.method.random_forks:
            wanted[:] = False
            wanted[:, 0] = torch.tensor([self._number("fork", leaf) for leaf in live]) < self.method.random_forks
        growing: dict[Group, list[tuple[int, int]]] = {}
        for row, rank in wanted.nonzero().tolist():
            leaf = live[row]
            if leaf.in_tree and leaf.group.growing and self._is_word(int(ids[row, rank + 1])):
                growing.setdefault(leaf.group, []).append((row, rank + 1))
        found = []
        for group, pairs in growing.items():
            room = group.capacity - len(group.tree)
            found += self.method.within(room, pairs, [float(probabilities[pair]) for pair in pairs])
        return found

    def _is_word(self, token: int) -> bool:
        """Whether a branch may begin with this token."""
        tokenizer = self.task.tokenizer
        return not self.method.words or tokenizer is None or is_word(str(tokenizer.decode([token])))

    def _samples(self, leaf: Leaf) -> bool:
        """Whether a leaf that does not fork draws its token, rather than taking the likeliest."""
        group = leaf.group
        if not (group.growing and leaf.in_tree):
            return True
        sample = self.method.sample
        return sample == "always" or (sample == "full" and len(group.tree) == group.capacity)

    def _number(self, what: str, leaf: Leaf) -> float:
        """Return the random number that is named by what it is for, the prompt, the branch and the position."""
        sampler, text = self.task.sampler, leaf.text
        names = ("latr", what, sampler.first_row + text.index, leaf.slot, len(text.ids))
        return float(substream(sampler.seed, *names).random())

    def _write(self, leaf: Leaf, token: int, log_prob: float) -> None:
        """Append a token to a leaf, which may end it."""
        text, stops = leaf.text, self.task.stops
        text.ids.append(token)
        text.trace.from_draft.append(False)
        text.log_weight += log_prob
        if token in self._ends or (stops is not None and stops(text.index, text.ids)):
            text.finish = "stop"
        elif len(text.new_ids) >= self.task.max_new_tokens:
            text.finish = "length"

    def _prune(self, leaves: list[Leaf], step: int) -> list[Leaf]:
        """Remove the branches of a comparing age that are like their parent; return them and their descendants."""
        due = []
        for leaf in leaves:
            age, parent = step - leaf.birth, leaf.parent
            if parent is None or not leaf.group.growing or age not in self.method.steps:
                continue
            ended = leaf.text.finish or parent.text.finish
            if not ended and self.method.rejoins(leaf.text.ids[-age:], parent.text.ids[-age:]):
                due.append(leaf)
        removed: list[Leaf] = []
        for leaf in due:
            if leaf not in removed:
                removed += leaf.group.prune(leaf)
        return removed

    def _answer(self, group: Group) -> Emission:
        """Answer with the branch of the highest mean log-probability."""
        answer = group.answer
        best = max(group.branches, key=lambda text: text.log_weight / len(text.new_ids))
        answer.ids += best.new_ids
        answer.trace.from_draft, answer.log_weight, answer.finish = (
            list(best.trace.from_draft),
            best.log_weight,
            best.finish,
        )
        return Emission(answer.index, best.new_ids, [False] * len(best.new_ids), answer.finish)
