"""The draft trees of Token Recycling: the published one, and one that grows where it is accepted."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenary.decode.token_recycling.successors import Successors

#: How many children each node of the published tree has, a node being its path of ranks (from 0); breadth first.
CHILDREN: dict[tuple[int, ...], int] = {
    (): 8,
    **{(0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1},
    **{(0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1},
    **{(1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1},
    **{(0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1},
    **{(0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1},
    **{(0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1},
    **{(0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1},
}


def rank_paths() -> list[tuple[int, ...]]:
    """Return the 80 rank paths of the published tree, breadth first."""
    return [(*parent, rank) for parent, children in CHILDREN.items() for rank in range(children)]


def unlikeliness(path: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Sort key of a rank path: acceptance falls with every step and with the logarithm of its rank."""
    return sum(1 + 1.5 * math.log2(1 + rank) for rank in path), path


@dataclass
class Draft:
    """One tree under way; a node's order is how many tokens beyond its parent were known when it was looked up."""

    ids: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    orders: list[int] = field(default_factory=lambda: [0])
    ranks: list[int] = field(default_factory=lambda: [0])
    chances: list[float] = field(default_factory=lambda: [1.0])

    def add(self, token: int, parent: int, order: int, rank: int, chance: float = 0.0) -> int:
        """Append a node; return its number."""
        for values, value in zip(vars(self).values(), (token, parent, order, rank, chance), strict=True):
            values.append(value)
        return len(self.ids) - 1

    def first(self, size: int) -> Draft:
        """Return the first nodes."""
        return Draft(*(values[:size] for values in vars(self).values()))


def grow(
    successors: Successors, context: Sequence[int], chances: Sequence[Sequence[float]], nodes: int, least: float
) -> Draft:
    """Add the likeliest node again and again, until there are `nodes`, or the next is less likely than `least`.

    Parameters
    ----------
    successors : Successors
        What is known.
    context : sequence of int
        All tokens so far.
    chances : sequence of sequence of float
        Share of accepted nodes by order and rank, falling with rank.
    nodes : int
        Most nodes.
    least : float
        Of the product of the chances along a path.
    """
    draft, history = Draft([context[-1]]), [list(context[-successors.context :])]
    heap: list[tuple[float, int, int, int, list[int]]] = []

    def push(parent: int, order: int, rank: int, tokens: list[int]) -> None:
        chance = draft.chances[parent] * chances[order][rank]
        if rank < len(tokens) and chance >= least:
            heapq.heappush(heap, (-chance, parent, order, rank, tokens))

    node = 0
    while True:
        found = successors.find(history[node])
        if found is not None:
            push(node, found[0], 0, found[1])
        if not heap or len(draft.ids) > nodes:
            return draft
        negative, parent, order, rank, tokens = heapq.heappop(heap)
        node = draft.add(tokens[rank], parent, order, rank, -negative)
        history.append([*history[parent], tokens[rank]][-successors.context :])
        if rank + 1 < len(tokens):
            push(parent, order, rank + 1, tokens)


def expand(successors: Successors, context: Sequence[int], paths: Sequence[tuple[int, ...]]) -> Draft:
    """Follow fixed rank paths, parents first; a path that leads into the unknown is left out."""
    draft = Draft([context[-1]])
    at: dict[tuple[int, ...], int] = {(): 0}
    history = {0: list(context[-successors.context :])}
    known = {0: successors.find(history[0])}
    for path in paths:
        parent = at.get(path[:-1])
        found = None if parent is None else known[parent]
        if found is not None and parent is not None and path[-1] < len(found[1]):
            token = found[1][path[-1]]
            node = at[path] = draft.add(token, parent, found[0], path[-1])
            history[node] = [*history[parent], token][-successors.context :]
            known[node] = successors.find(history[node])
    return draft
