"""The draft tree: a PUCT Monte-Carlo tree search over the trigram table, and a beam to compare it with."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from tokenary.decode.aded.drift import Table, find
from tokenary.decode.aded.store import BITS

#: Iterations, states on a path (the root is one), exploration constants, and nodes whose paths are read out.
ITERATIONS, STATES, C1, C2, PATHS = 150, 4, 32.0, 8.0, 24
#: Most nodes of a searched tree: each node read out, the root apart, and one successor of it.
MOST = 2 * (PATHS - 1)


@njit(cache=True)
def mcts(
    table: Table, prev: int, last: int, uniforms: np.ndarray, budget: int, slip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Search for the continuations of a pair of tokens.

    Each iteration (a) goes down from the root to the child of the highest
    ``Q / N + (c1 + ln((N_parent + c2 + 1) / c2)) p sqrt(N_parent) / (1 + N)``, any unvisited child first, (b) creates
    all children of the node where that ends and steps into one, (c) rolls out to 4 states, successors drawn in
    proportion to their scores, and (d) credits every node on the way with 1 + the scores of the whole path. Successors
    are walked from the likeliest, which settles ties.

    The 24 most visited nodes, and the likeliest successor of each but the root, make the tree, ordered by visits. A
    successor that is not itself among the 24 counts the visits of its parent times its share of the scores.

    Parameters
    ----------
    table : Table
        The trigram scores.
    prev, last : int
        The newest two tokens.
    uniforms : np.ndarray
        Random numbers in [0, 1), one for each iteration and state after the root, (iterations, 3).
    budget : int
        Most nodes, the root apart.
    slip : bool
        Sum the rewards as the published code does: for each step from (a, b), the score of b, not of the step's token.

    Returns
    -------
    ids, parents : np.ndarray
        int64, (n + 1,), n <= budget; the root first.
    """
    iterations, states = uniforms.shape[0], uniforms.shape[1] + 1
    room = 1 + iterations * table.width  # a node has at most `width` children
    token, parent = np.empty(room, np.int64), np.empty(room, np.int64)
    pair, p = np.empty(room, np.int64), np.empty(room, np.float64)
    visits, total = np.zeros(room, np.int64), np.zeros(room, np.float64)
    first, fan = np.zeros(room, np.int64), np.zeros(room, np.int64)  # first child (0: none yet), number of them
    token[0], parent[0], pair[0], used = last, -1, prev << BITS | last, 1

    for iteration in range(iterations):
        node, state, reward = 0, 1, 1.0
        while first[node] and state < states:
            n = visits[node]
            best, chosen = -1.0, -1
            for child in range(first[node], first[node] + fan[node]):
                if visits[child] == 0:
                    chosen = child
                    break
                value = total[child] / visits[child] + (C1 + math.log((n + C2 + 1) / C2)) * p[child] * math.sqrt(n) / (
                    1 + visits[child]
                )
                if value > best:
                    best, chosen = value, child
            reward += _slipped(table, pair[node]) if slip else p[chosen]
            node, state = chosen, state + 1
        if state < states:
            own, start, count = find(table, pair[node])
            if count:
                first[node], fan[node] = used, count
                for i in range(start, start + count):
                    token[used] = table.drifted_tokens[i] if own else table.tokens[i]
                    p[used] = table.drifted_scores[i] if own else table.scores[i]
                    parent[used], pair[used] = node, _next(pair[node], token[used])
                    used += 1
                reward += _slipped(table, pair[node]) if slip else p[first[node]]
                node, state = first[node], state + 1
        at = pair[node]
        while state < states:
            drawn, score = _draw(table, at, uniforms[iteration, state - 1])
            if drawn < 0:
                break
            reward += _slipped(table, at) if slip else score
            at, state = _next(at, drawn), state + 1
        while node >= 0:
            visits[node] += 1
            total[node] += reward
            node = parent[node]
    return _read_out(table, token[:used], parent[:used], pair[:used], visits[:used], budget)


@njit(cache=True)
def _read_out(
    table: Table, token: np.ndarray, parent: np.ndarray, pair: np.ndarray, visits: np.ndarray, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turn visit counts into a draft tree: parents first, more visited first."""
    rank = np.full(len(token), -1, np.int64)  # place among the nodes read out
    ids, parents = np.empty(2 * PATHS, np.int64), np.empty(2 * PATHS, np.int64)
    weights, pairs = np.empty(2 * PATHS, np.float64), np.empty(PATHS, np.int64)
    ranked = min(PATHS, len(token))
    for place in range(ranked):
        best = -1
        for node in range(len(token)):
            if rank[node] < 0 and (best < 0 or visits[node] > visits[best]):
                best = node
        rank[best] = place
        ids[place], weights[place], pairs[place] = token[best], visits[best], pair[best]
        parents[place] = rank[parent[best]] if best else -1
    size = ranked
    for place in range(1, ranked):
        own, start, count = find(table, pairs[place])
        if count == 0:
            continue
        score = table.drifted_scores[start] if own else table.scores[start]
        successor = table.drifted_tokens[start] if own else table.tokens[start]
        known = False
        for other in range(ranked):
            known = known or (parents[other] == place and ids[other] == successor)
        if not known:
            ids[size], parents[size] = successor, place
            weights[size] = weights[place] * score / _total(table, own, start, count)
            size += 1
    return _sorted(ids[:size], parents[:size], weights[:size], budget)


@njit(cache=True)
def _sorted(ids: np.ndarray, parents: np.ndarray, weights: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort a tree by descending weight, stably, and cut it. No node weighs more than its parent, which precedes it."""
    order, place = np.arange(len(ids)), np.empty(len(ids), np.int64)
    for i in range(1, len(ids)):
        at, node = i, order[i]
        while at > 0 and weights[order[at - 1]] < weights[node]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = node
    size = min(len(ids), budget + 1)
    new_ids, new_parents = np.empty(size, np.int64), np.empty(size, np.int64)
    for new in range(size):
        node = order[new]
        place[node] = new
        new_ids[new] = ids[node]
        new_parents[new] = place[parents[node]] if new else -1
    return new_ids, new_parents


@njit(cache=True)
def beam(table: Table, prev: int, last: int, depth: int, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Take the `budget` likeliest nodes down to `depth` tokens, a path's weight being the product of its shares.

    A beam of that width keeps the same nodes: none of them can be less likely than `budget` others of its level.

    Returns
    -------
    ids, parents : np.ndarray
        int64, (n + 1,), n <= budget; the root first, likelier nodes before less likely ones.
    """
    room = 1 + (budget + 1) * table.width
    token, parent, level = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    pair, weight, taken = np.empty(room, np.int64), np.empty(room, np.float64), np.zeros(room, np.bool_)
    token[0], parent[0], level[0], pair[0], weight[0], used = last, -1, 0, prev << BITS | last, 1.0, 1
    ids, parents = np.empty(budget + 1, np.int64), np.empty(budget + 1, np.int64)
    for size in range(budget + 1):
        best = -1
        for node in range(used):
            if not taken[node] and (best < 0 or weight[node] > weight[best]):
                best = node
        if best < 0:
            return ids[:size], parents[:size]
        taken[best] = True
        ids[size], parents[size] = token[best], parent[best]
        own, start, count = find(table, pair[best])
        if level[best] == depth or count == 0:
            continue
        total = _total(table, own, start, count)
        for i in range(start, start + count):
            token[used] = table.drifted_tokens[i] if own else table.tokens[i]
            score = table.drifted_scores[i] if own else table.scores[i]
            parent[used], level[used] = size, level[best] + 1
            pair[used], weight[used] = _next(pair[best], token[used]), weight[best] * score / total
            used += 1
    return ids, parents


@njit(cache=True)
def _next(pair: int, token: int) -> int:
    """The pair after `pair` once `token` follows."""
    return (pair & ((1 << BITS) - 1)) << BITS | token


@njit(cache=True)
def _total(table: Table, own: bool, start: int, count: int) -> float:
    """Sum of the scores of a row."""
    total = 0.0
    for i in range(start, start + count):
        total += table.drifted_scores[i] if own else table.scores[i]
    return total


@njit(cache=True)
def _draw(table: Table, pair: int, uniform: float) -> tuple[int, float]:
    """Draw a successor in proportion to the scores; token -1 if the pair is unknown."""
    own, start, count = find(table, pair)
    if count == 0:
        return -1, 0.0
    tokens = table.drifted_tokens if own else table.tokens
    scores = table.drifted_scores if own else table.scores
    left, at = uniform * _total(table, own, start, count), start
    while at < start + count - 1 and left > scores[at]:
        left -= scores[at]
        at += 1
    return tokens[at], scores[at]


@njit(cache=True)
def _slipped(table: Table, pair: int) -> float:
    """The score of a pair's second token after the pair, 0 if it never followed."""
    own, start, count = find(table, pair)
    for i in range(start, start + count):
        if (table.drifted_tokens[i] if own else table.tokens[i]) == pair & ((1 << BITS) - 1):
            return table.drifted_scores[i] if own else table.scores[i]
    return 0.0
