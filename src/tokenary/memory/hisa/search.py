"""The search: which tokens a query's index scores highest, found through means of blocks of keys.

Blocks are of B tokens, counted from the start of the text. A block is *closed* once all its tokens are there; its mean
is then taken once. The block of a query itself is always searched, so that its mean is never needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenary.memory.hisa.blocks import BlockIndex, Branches
from tokenary.memory.hisa.indexer import score
from tokenary.memory.hisa.plan import Plan
from tokenary.memory.read_base import highest, listed

TILE = 1 << 22  # numbers of index keys that are gathered at once


def choose_blocks(
    queries: Tensor, weights: Tensor, places: Tensor, count: Tensor, index: BlockIndex, plan: Plan, new: Branches | None
) -> Tensor:
    """Stage one: choose blocks by the score of their mean key, J[t, b] = sum_j w[t, j] relu(q[t, j] . mean_b k).

    Parameters
    ----------
    queries, weights, places, count, index, plan, new
        As in `search`.

    Returns
    -------
    Tensor
        (Q, M) bool; the first block and that of the query are always chosen.
    """
    current, rows = places // plan.block, torch.arange(len(places), device=places.device)
    scores = queries.new_full((len(places), int(current.max()) + 1), float("-inf"))
    closed = min(index.closed, scores.shape[1])
    scores[:, :closed] = score(queries, weights, index.means[:closed])
    if new is not None:
        for node, number, mean in new.closed_blocks(index):
            behind = new.sees[:, node]
            scores[behind, number] = score(queries[behind], weights[behind], mean)[:, 0]
    numbers = torch.arange(scores.shape[1], device=places.device)
    scores.masked_fill_(numbers >= current[:, None], float("-inf"))
    if plan.forced == "inside" or plan.search == "blocks":
        scores[:, 0] = torch.finfo(scores.dtype).max
        scores[rows, current] = float("inf")
    chosen = highest(scores, plan.searched(current, count))
    if plan.forced == "beside" and plan.search != "blocks":
        chosen[:, 0] = True
        chosen[rows, current] = True
    return chosen


def search(
    queries: Tensor,
    weights: Tensor,
    places: Tensor,
    count: Tensor,
    index: BlockIndex,
    plan: Plan,
    new: Branches | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the tokens that queries read.

    Parameters
    ----------
    queries, weights : Tensor
        Of the indexer, (Q, H, d) and (Q, H).
    places : Tensor
        Positions of the queries, (Q,) int64; a query sees the tokens up to its own.
    count : Tensor
        How many tokens each reads, (Q,) int64, itself included.
    index : BlockIndex
        Of all tokens; with `new`, of those before them.
    plan : Plan
        How to search.
    new : Branches, optional
        The queries' own tokens, where they lie in a tree.

    Returns
    -------
    Tensor, Tensor
        Tokens (Q, K) int64, those of `new` counted on from `index.size`, and which of them are real, (Q, K) bool.
    """
    if plan.searches_all(places // plan.block, count):
        return _search_flat(queries, weights, places, count, index, new)
    chosen = choose_blocks(queries, weights, places, count, index, plan, new)
    blocks, real = listed(chosen)  # (Q, C)
    starts = (blocks * plan.block).masked_fill_(~real, torch.iinfo(torch.long).max // 2)
    last = places.clamp(max=index.size - 1)[:, None]
    size = max(1, TILE // max(1, blocks.shape[1] * plan.block * queries.shape[-1]))
    found = []
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        tokens = (starts[part, :, None] + torch.arange(plan.block, device=blocks.device)).flatten(1)
        seen = tokens <= last[part]
        scores = score(queries[part], weights[part], index.of_blocks(blocks[part]))
        if new is not None:
            scores = torch.cat([scores, score(queries[part], weights[part], new.keys)], dim=1)
            own = index.size + torch.arange(len(new.keys), device=tokens.device).expand(len(tokens), -1)
            tokens = torch.cat([tokens, own], dim=1)
            seen = torch.cat([seen, new.sees[part] & chosen[part][:, new.places // plan.block]], dim=1)
        if plan.search == "blocks":
            at, is_real = listed(seen)
        else:
            at, is_real = best(scores.masked_fill_(~seen, float("-inf")), count[part])
        found.append((tokens.gather(1, at), is_real))
    return _joined(found)


def _search_flat(
    queries: Tensor, weights: Tensor, places: Tensor, count: Tensor, index: BlockIndex, new: Branches | None
) -> tuple[Tensor, Tensor]:
    """Score every token: the indexer of DSA."""
    keys = index.keys if new is None else torch.cat([index.keys, new.keys])
    size = max(1, 4 * TILE // max(1, len(keys)))
    found = []
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        seen = torch.arange(len(keys), device=places.device) <= places[part, None]
        if new is not None:
            seen[:, index.size :] = new.sees[part]
        scores = score(queries[part], weights[part], keys)
        found.append(best(scores.masked_fill_(~seen, float("-inf")), count[part]))
    return _joined(found)


def best(scores: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """List the `count` (Q,) highest scores of every row (Q, N), the earlier ones of equal scores; see `listed`."""
    most = min(int(count.max()), scores.shape[1])
    if most == int(count.min()):
        top = scores.topk(most, sorted=False)
        if bool(((scores >= top.values.amin(1, keepdim=True)).sum(1) == most).all()):  # no equal score was left out
            return top.indices, torch.ones_like(top.indices, dtype=torch.bool)
    return listed(highest(scores, count))


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Put lists of different length one under the other."""
    if len(parts) == 1:
        return parts[0]
    most = max(tokens.shape[1] for tokens, _ in parts)
    padded = [[pad(side, (0, most - side.shape[1])) for side in lists] for lists in parts]
    tokens, real = (torch.cat(sides) for sides in zip(*padded, strict=True))
    return tokens, real
