"""How much probability the encodings of a target have where the passage was copied up to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tokenary.core.tree import TokenTree
from tokenary.hf.target import Target, attached
from tokenary.models.lm import LM

Sequences = Sequence[Sequence[int]]
BATCH = 8


@dataclass(frozen=True)
class Place:
    """A place in a copy, and what may stand there.

    Parameters
    ----------
    context : sequence of int
        Everything before it, the prompt included.
    own : sequence of int
        The tokenizer's own encoding of the word.
    respelled : sequence of sequence of int
        Other encodings of the same bytes.
    respaced : sequence of sequence of int
        Encodings of the word with other white space before it.
    """

    context: Sequence[int]
    own: Sequence[int]
    respelled: Sequences
    respaced: Sequences


@torch.inference_mode()
def mass(lm: LM, places: Sequence[Place]) -> list[dict[str, float]]:
    """Return the probabilities of ``own``, ``respelled``, ``respaced`` and everything ``else`` at each place.

    One pass scores all encodings of a place: they are the paths of a tree.
    """
    trees = [prefix_tree(place.context[-1], _all(place)) for place in places]
    tree = TokenTree.stack([(ids, parents) for ids, parents, _ in trees])
    with attached(lm.model):
        target = Target(lm.model)
        target.prefill([place.context[:-1] for place in places])
        logits = target.score(tree)
    found = []
    for row, (place, (ids, parents, leaves)) in enumerate(zip(places, trees, strict=True)):
        scores = logits[row].float().log_softmax(-1)
        total = [0.0] * len(ids)
        for node in range(1, len(ids)):
            total[node] = total[parents[node]] + float(scores[parents[node], ids[node]])
        chances = [math.exp(total[leaf]) for leaf in leaves]
        own, same = chances[0], sum(chances[1 : 1 + len(place.respelled)])
        other = sum(chances[1 + len(place.respelled) :])
        found.append({"own": own, "respelled": same, "respaced": other, "else": max(0.0, 1 - own - same - other)})
    return found


def mean_mass(lm: LM, places: Sequence[Place], step: Callable[[int], None]) -> dict[str, float] | None:
    """Return the mean of `mass` over places, with their number as ``targets``; None without any."""
    found = []
    for at in range(0, len(places), BATCH):
        found += mass(lm, places[at : at + BATCH])
        step(len(places[at : at + BATCH]))
    if not found:
        return None
    return {"targets": len(found)} | {name: sum(row[name] for row in found) / len(found) for name in found[0]}


def _all(place: Place) -> Sequences:
    return [place.own, *place.respelled, *place.respaced]


def prefix_tree(root: int, sequences: Sequences) -> tuple[list[int], list[int], list[int]]:
    """Put sequences behind a token into one tree; return ids, parents and the node that each sequence ends at."""
    ids, parents = [root], [-1]
    leaves: list[int] = []
    node_of: dict[tuple[int, ...], int] = {(): 0}
    for sequence in sequences:
        for stop in range(1, len(sequence) + 1):
            path = tuple(sequence[:stop])
            if path not in node_of:
                node_of[path] = len(ids)
                ids.append(path[-1])
                parents.append(node_of[path[:-1]])
        leaves.append(node_of[tuple(sequence)])
    return ids, parents, leaves
