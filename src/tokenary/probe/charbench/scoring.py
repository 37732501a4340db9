"""Two ways to get an answer: the likeliest of all numbers (closed), or what the model writes (open).

Prompts of one task begin alike. That beginning is read once a batch; the rest of each prompt and, for closed scoring,
all answers behind it, are then one tree and one pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.models.lm import LM
from tokenary.probe.base import Progress
from tokenary.probe.charbench.items import Item
from tokenary.probe.charbench.prompts import Prompter, shared

_NUMBER = re.compile(r"[+-]?[0-9]+")
_MOST_NEW = 8

Scoring = Literal["closed", "open"]
Told = Callable[[int], None]


def closed(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    batch: int = 16,
    told: Told | None = None,
) -> np.ndarray:
    """Return the log-likelihood of each answer behind each prompt, in nats, float64, (N, A).

    Parameters
    ----------
    lm : LM
        A causal language model.
    prompts : sequence of sequence of int
        Ids, the first of which are the same in all.
    answers : sequence of sequence of int
        Ids of each answer; its likelihood is the product over all of them.
    batch : int
        Prompts a pass.
    told : callable, optional
        Called with how many prompts each pass did.
    """
    inner = sorted({tuple(answer[:end]) for answer in answers for end in range(1, len(answer))}, key=len)
    place = {(): 0} | {path: number for number, path in enumerate(inner, start=1)}
    steps = [[(place[tuple(answer[:i])], answer[i]) for i in range(len(answer))] for answer in answers]
    found = np.zeros((len(prompts), len(answers)))
    prefix = _prefix(prompts)
    with attached(lm.model):
        for at in range(0, len(prompts), batch):
            rests = [prompt[prefix:] for prompt in prompts[at : at + batch]]
            target = _begun(lm, prompts[0][:prefix], len(rests))
            logits = target.score(TokenTree.stack([_tree(rest, place) for rest in rests]))
            for row, rest in enumerate(rests):
                nodes = [len(rest) - 1, *range(len(rest), len(rest) + len(inner))]
                scores = logits[row, nodes].float().log_softmax(-1).double().cpu().numpy()
                found[at + row] = [sum(scores[node, token] for node, token in path) for path in steps]
            if told is not None:
                told(len(rests))
    return found


def opened(
    lm: LM, prompts: Sequence[Sequence[int]], batch: int = 16, told: Told | None = None, line: bool = False
) -> list[int | None]:
    """Decode at most 8 tokens greedily behind each prompt; return the number written, None for anything else.

    Parameters
    ----------
    lm, prompts, batch, told
        See `closed`.
    line : bool
        The answer ends with its line, not only with an end token.
    """
    found: list[int | None] = []
    prefix, ends = _prefix(prompts), set(lm.eos_token_ids)
    with attached(lm.model):
        for at in range(0, len(prompts), batch):
            rests = [list(prompt[prefix:]) for prompt in prompts[at : at + batch]]
            target = _begun(lm, prompts[0][:prefix], len(rests))
            logits = target.score(TokenTree.chains(rests))
            target.commit([range(len(rest)) for rest in rests])
            newest = [int(logits[row, len(rest) - 1].argmax()) for row, rest in enumerate(rests)]
            written: list[list[int]] = [[token] for token in newest]
            while len(written[0]) < _MOST_NEW and not all(ends & set(ids) for ids in written):
                newest = target.score(TokenTree.roots(newest))[:, 0].argmax(-1).tolist()
                target.commit([range(1)] * len(rests))
                for ids, token in zip(written, newest, strict=True):
                    ids.append(token)
            found += [parse(lm.decode(_until(ids, ends)), line) for ids in written]
            if told is not None:
                told(len(rests))
    return found


def parse(text: str, line: bool = False) -> int | None:
    """Read an answer: exactly one integer, white space aside; with `line`, of its first line."""
    text = text.strip()
    text = text.partition("\n")[0].strip() if line else text
    return int(text) if _NUMBER.fullmatch(text) else None


def _prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How much of the prompts is read once; something of each is left."""
    return min(shared(prompts), min(map(len, prompts)) - 1)


@torch.inference_mode()
def _begun(lm: LM, prefix: Sequence[int], rows: int) -> Target:
    target = Target(lm.model)
    target.prefill([prefix])
    target.select_rows([0] * rows)
    return target


def _tree(rest: Sequence[int], place: dict[tuple[int, ...], int]) -> tuple[list[int], list[int]]:
    """The rest of a prompt as a chain, and behind it the answers without their last tokens."""
    behind = len(rest) - 1
    paths = list(place)[1:]
    ids = [*rest, *(path[-1] for path in paths)]
    parents = [*range(-1, behind), *(behind + place[path[:-1]] for path in paths)]
    return ids, parents


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    return list(ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))])


class Asker:
    """Puts the questions of one run, and counts them.

    Parameters
    ----------
    prompter : Prompter
        Writes the prompts, and knows the model.
    batch : int
        Prompts a pass.
    progress : callable, optional
        Called with (done, total).
    total : int
        How many questions there will be.
    """

    def __init__(self, prompter: Prompter, batch: int, progress: Progress | None, total: int) -> None:
        self.prompter, self.batch, self.progress = prompter, batch, progress
        self.done, self.total = 0, total

    def ask(
        self, task: str, mode: Scoring, words: Mapping[Item, Mapping[str, Sequence[int]]], spaced: bool = False
    ) -> dict[str, dict[Item, int | None]]:
        """Ask about each item in every way that its word is given; return the answers by way."""
        answers = self.prompter.answers(task)
        found: dict[str, dict[Item, int | None]] = {}
        for arm in next(iter(words.values())):
            rows = [self.prompter.prompt(item, ways[arm], answers.lead, spaced) for item, ways in words.items()]
            numbers: Sequence[int | None]
            if mode == "closed":
                scores = closed(self.prompter.lm, rows, answers.numbers, self.batch, self._told)
                numbers = scores.argmax(1).tolist()
            else:
                numbers = opened(self.prompter.lm, rows, self.batch, self._told, line=self.prompter.raw)
            found[arm] = dict(zip(words, numbers, strict=True))
        return found

    def _told(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)
