"""A language model that reads less of a context, and what is left of coherence.

A *way* of reading says what becomes of the tokens of a context behind its first one. Dropping them in front of the
model is done here; a reducer between its layers comes as a context manager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.core.seeding import substream
from tokenary.probe.token_reduction_position.coherence import contradictions, distinct, longest_repeat
from tokenary.probe.token_reduction_position.effects import Array, Parts
from tokenary.probe.token_reduction_position.passages import Fact, Passage

#: Which of `count` tokens of an item's context stay, ascending.
Keep = Callable[[int, int], Sequence[int]]
#: Called with the model, the number of the item, where the tokens that may become fewer begin in the prompt, and how
#: many they are.
Inside = Callable[[Any, int, int, int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Way:
    """A way of reading a context.

    Parameters
    ----------
    keep : callable, optional
        Chooses tokens before the model reads them; all by default.
    compact : bool
        Whether kept tokens are counted anew, or keep the positions that they had.
    inside : callable, optional
        What makes them fewer between the layers.
    """

    keep: Keep | None = None
    compact: bool = True
    inside: Inside | None = None

    def prompt(self, number: int, context: Sequence[int], tail: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return ids and positions of what is read of an item and of what follows it."""
        rest = range(len(context) - 1)
        kept = [0, *(1 + i for i in (rest if self.keep is None else self.keep(number, len(context) - 1)))]
        places = kept + list(range(len(context), len(context) + len(tail)))
        ids = [context[i] for i in kept] + list(tail)
        return ids, list(range(len(ids))) if self.compact else places

    def around(self, model: Any, number: int, context: int) -> AbstractContextManager[Any]:
        """Return what holds while the prompt of an item is read and answered."""
        return contextlib.nullcontext() if self.inside is None else self.inside(model, number, 1, context - 1)


def at_random(share: float, seed: int) -> Keep:
    """Keep random tokens."""

    def keep(number: int, count: int) -> list[int]:
        stream = substream(seed, "token-reduction-position", "random", number)
        return sorted(stream.choice(count, max(1, round(share * count)), replace=False).tolist())

    return keep


def strided(share: float) -> Keep:
    """Keep tokens at even distances."""

    def keep(number: int, count: int) -> list[int]:
        kept = max(1, round(share * count))
        return [(2 * i + 1) * count // (2 * kept) for i in range(kept)]

    return keep


def nothing(number: int, count: int) -> list[int]:
    """Keep nothing."""
    return []


@torch.inference_mode()
def log_likelihoods(model: Any, way: Way, number: int, context: Sequence[int], tail: Sequence[int]) -> Tensor:
    """Return log-probabilities (L + 1, V) float32: of every token of the tail (L) in its place, and of the next one."""
    ids, positions = way.prompt(number, context, tail)
    with way.around(model, number, len(ids) - len(tail)):
        logits = forward(model, ids, positions, None, len(tail) + 1)[0]
    return logits[0].float().log_softmax(-1)


@torch.inference_mode()
def written(model: Any, way: Way, number: int, context: Sequence[int], count: int) -> list[int]:
    """Go on greedily for `count` tokens."""
    ids, positions = way.prompt(number, context, ())
    with way.around(model, number, len(ids)):
        return greedy(model, ids, positions, count)[0]


def greedy(
    model: Any, ids: Sequence[int], positions: Sequence[int], count: int, ends: Callable[[int], bool] | None = None
) -> tuple[list[int], Any]:
    """Read a prompt and go on for `count` tokens, or up to one that ends the text; return them and the cache.

    The cache holds all of them where the text ended, else all but the last.
    """
    found, past, new, at = list[int](), None, ids, positions
    while len(found) < count:
        logits, past = forward(model, new, at, past, 1)
        best = int(logits[0, -1].argmax())
        if ends is not None and ends(best):
            break
        found.append(best)
        new, at = found[-1:], [at[-1] + 1]
    return found, past


def forward(model: Any, ids: Sequence[int], positions: Sequence[int], past: Any, rows: int) -> tuple[Tensor, Any]:
    """Read tokens at their positions behind a cache; return the logits (1, rows, V) of the last ones, and the cache."""
    given = {name: torch.tensor([list(values)], device=model.device)
             for name, values in (("input_ids", ids), ("position_ids", positions))}  # fmt: skip
    if past is None:  # one mask of ones keeps gaps in the positions from being read as packed texts
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    output = model(**given, past_key_values=past, use_cache=True, logits_to_keep=rows)
    return output.logits, output.past_key_values


@dataclass(frozen=True)
class TextArm:
    """What one arm did, by seed and item.

    Attributes
    ----------
    chosen : (seeds, facts) int array
        The value that is told, forced to be one of them.
    free : (seeds, facts) int array
        The value that is the most likely next token of all; -1 where that is no value.
    nll : (seeds, passages) array
        Nats a token of the last tokens of a passage.
    distinct, repeat : (seeds, passages) array
        Share of different spans of two tokens, and the longest span that occurs twice, of a text written greedily.
    """

    chosen: Array
    free: Array
    nll: Array
    distinct: Array
    repeat: Array

    def parts(self, facts: Sequence[Fact]) -> dict[str, Parts]:
        """Return the figures of coherence as parts of effects."""
        stated = np.array([fact.stated for fact in facts])
        return {
            "facts_right": Parts.mean(self.chosen == stated),
            "contradictions": Parts.mean(contradictions(self.free, stated)),
            "tail_nll": Parts.mean(self.nll),
            "distinct_2": Parts.mean(self.distinct),
            "longest_repeat": Parts.mean(self.repeat),
        }


def run_ways(
    model: Any, ways: Sequence[Way], facts: Sequence[Fact], passages: Sequence[Passage], write: int
) -> Iterable[TextArm | None]:
    """Ask for facts and read passages in one way, or one a seed; yields None after every item, and the arm at last."""
    chosen, free, figures = [], [], []
    for way in ways:
        for number, fact in enumerate(facts):
            last = log_likelihoods(model, way, number, fact.context, fact.question)[-1]
            chosen.append(int(last[list(fact.values)].argmax()))
            best = int(last.argmax())
            free.append(fact.values.index(best) if best in fact.values else -1)
            yield None
        for number, passage in enumerate(passages):
            logs = log_likelihoods(model, way, number, passage.context, passage.after)[:-1]
            nll = -logs.gather(1, torch.tensor(passage.after, device=logs.device)[:, None]).mean()
            text = written(model, way, number, passage.context, write)
            figures.append((float(nll), distinct(text, 2), float(longest_repeat(text))))
            yield None
    seeds = len(ways)
    table = np.array(figures).reshape(seeds, len(passages), 3)
    yield TextArm(np.array(chosen).reshape(seeds, -1), np.array(free).reshape(seeds, -1), *np.moveaxis(table, 2, 0))
