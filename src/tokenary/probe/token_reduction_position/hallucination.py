"""Hallucination: yes and no to things that are not there (as POPE), names of things that are not there (as CHAIR).

Saying no, or nothing, lowers every rate of false names. So each comes with its recall, and false yes is also compared
at the recall of the control.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tokenary.probe.token_reduction_position.effects import Array, Interval, Parts, interval, weights


def existence(yes: ArrayLike, positive: ArrayLike, among: ArrayLike | None = None) -> dict[str, Parts]:
    """Return accuracy, precision, recall, F1, the share of yes, and the share of yes where no is right.

    Parameters
    ----------
    yes : array of bool
        Whether yes was answered: (n,) or (seeds, n).
    positive : (n,) array of bool
        Whether yes is right.
    among : (n,) array of bool, optional
        Questions that count, as those with one kind of negatives and all positives.
    """
    said, right = np.asarray(yes, dtype=bool), np.asarray(positive, dtype=bool)
    some = np.ones(len(right), bool) if among is None else np.asarray(among, dtype=bool)
    hit, false, missed = (part & some for part in (said & right, said & ~right, ~said & right))

    def parts(above: NDArray[np.bool_], below: ArrayLike) -> Parts:
        return Parts(above.astype(np.float64), np.broadcast_to(below, said.shape).astype(np.float64))

    return {
        "accuracy": parts((said == right) & some, some),
        "precision": parts(hit, hit | false),
        "recall": parts(hit, right & some),
        "f1": Parts(2.0 * hit, 2.0 * hit + false + missed),
        "yes_rate": parts(said & some, some),
        "false_yes": parts(false, ~right & some),
    }


def false_yes_at_equal_recall(
    scores: ArrayLike,
    control: ArrayLike,
    positive: ArrayLike,
    among: ArrayLike | None = None,
    *,
    recall: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return by how much the share of false yes differs from a control's, where both have the same recall.

    Each arm says yes above the highest threshold that reaches it, so that an arm differs from itself by 0.

    Parameters
    ----------
    scores, control : array
        Log-odds of yes: (n,) or (seeds, n).
    positive, among : (n,) array of bool
        As in `existence`.
    recall : float, optional
        By default that with which the control says yes above 0.
    resamples, seed : int
        Draws of the bootstrap, and their name.
    """
    right = np.asarray(positive, dtype=bool)
    some = np.ones(len(right), bool) if among is None else np.asarray(among, dtype=bool)
    drawn = weights(len(right), resamples, seed)
    found = []
    for draw in (np.ones((1, len(right))), drawn):
        plus, minus = draw * (right & some), draw * (~right & some)
        both = [np.atleast_2d(np.asarray(each, dtype=np.float64)) for each in (scores, control)]
        reached = _share(plus, both[1] > 0) if recall is None else np.full(len(draw), recall)
        rates = [np.mean([_at(row, plus, minus, reached) for row in arm], axis=0) for arm in both]
        found.append((rates[0], rates[1]))
    return interval(float((found[0][0] - found[0][1])[0]), found[1][0] - found[1][1])


def false_yes_at(scores: ArrayLike, positive: ArrayLike, recall: float) -> float:
    """Return the share of false yes at the highest threshold that reaches a recall, mean over seeds."""
    right = np.asarray(positive, dtype=bool)
    plus, minus = (side[None].astype(np.float64) for side in (right, ~right))
    table = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    return float(np.mean([_at(row, plus, minus, np.array([recall])) for row in table]))


def _share(weight: Array, said: NDArray[np.bool_]) -> Array:
    """Weighed share of yes, mean over seeds: weight (draws, n), said (seeds, n) -> (draws,)."""
    total = weight.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, (weight @ said.T).mean(1) / total, np.nan)


def _at(scores: Array, plus: Array, minus: Array, recall: Array) -> Array:
    """Share of false yes, (draws,), at the highest threshold whose recall reaches `recall` (draws,)."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores are told apart by no threshold
    hits, false = (np.cumsum(each[:, order], axis=1)[:, last] for each in (plus, minus))
    hits, false = (np.pad(each, ((0, 0), (1, 0))) for each in (hits, false))  # first of all, say yes to nothing
    enough = hits >= (recall * plus.sum(1))[:, None] - 1e-9
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.take_along_axis(false, enough.argmax(1)[:, None], 1)[:, 0] / minus.sum(1)


def listing(named: Sequence[Iterable[str]], there: Sequence[Iterable[str]]) -> Mapping[str, Array]:
    """Count the names in n answers and the things in n pictures.

    Returns
    -------
    mapping of (n,) float64 arrays
        ``named``; ``false``, those of them that are not there; ``any_false``; ``there``, different things in the
        picture; ``found``, those that were named; ``twice``, names above the number of such things.
    """
    rows = []
    for said, seen in zip(named, there, strict=True):
        names, things = Counter(said), Counter(seen)
        false = sum(count for name, count in names.items() if name not in things)
        twice = sum(max(0, count - things[name]) for name, count in names.items() if name in things)
        rows.append((names.total(), false, false > 0, len(things), len(set(names) & set(things)), twice))
    keys = ("named", "false", "any_false", "there", "found", "twice")
    table = np.asarray(rows, dtype=np.float64).reshape(-1, len(keys))
    return dict(zip(keys, table.T, strict=True))


def chair(counts: Sequence[Mapping[str, Array]]) -> dict[str, Parts]:
    """Return the rates of false names, by name and by answer, with recall and repeats; of one run or several seeds."""
    joined = {key: np.stack([each[key] for each in counts]) for key in counts[0]}
    ones = np.ones_like(joined["named"])
    return {
        "false_names": Parts(joined["false"], joined["named"]),
        "answers_with_false_names": Parts(joined["any_false"], ones),
        "listing_recall": Parts(joined["found"], joined["there"]),
        "named_twice": Parts(joined["twice"], joined["named"]),
    }


def divergence(seen: Tensor, blind: Tensor) -> Tensor:
    """Return the KL divergence, in nats, of answers with the picture from blind ones: log-probabilities (n, V) -> (n,).

    Near 0 where the language model answers by itself.
    """
    return (seen.double().exp() * (seen.double() - blind.double())).sum(-1).clamp_min(0)


def agreement(answers: Tensor, swapped: Tensor) -> Tensor:
    """Return whether the same is answered to a wrong picture, ids (n,) each: (n,) float64."""
    return (answers == swapped).to(torch.float64)
