"""Token Recycling against slow references: the table, the published tree, the grown tree, what is learned."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_drafting import PROMPTS, decode

from tokenary.core.errors import OptionError, UnknownNameError
from tokenary.core.tree import TokenTree
from tokenary.decode import TokenRecycling
from tokenary.decode.scores import Scores
from tokenary.decode.token_recycling.successors import Successors
from tokenary.decode.token_recycling.trees import grow, rank_paths
from tokenary.models import tiny_lm

PUBLISHED = {"tree": "published", "context": 1, "prompt": False}


def table_of(method):
    """The rows of single tokens that were written: {token: successors}."""
    keys, ranked = method.successors.keys[0], method.successors.ranked[0]
    return {int(keys[slot]): ranked[slot].tolist() for slot in np.flatnonzero(keys >= 0)}


def filled(options, vocab=50, seed=0):
    """A method whose table of single tokens is random, and the table."""
    method = TokenRecycling(**options)
    k, context = method.successors.k, method.successors.context
    table = np.random.default_rng(seed).permuted(np.tile(np.arange(vocab), (vocab, 1)), axis=1)[:, :k]
    contexts = np.full((vocab, context), -1)
    contexts[:, -1] = np.arange(vocab)
    method.successors.write(contexts, table)
    return method, table


def test_the_published_tree():
    """80 nodes over six depths, as the paper's template has them; every parent is there, before its children."""
    paths = rank_paths()
    assert Counter(map(len, paths)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert len(set(paths)) == 80
    for at, path in enumerate(paths):
        assert len(path) == 1 or path[:-1] in paths[:at]


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=9), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_successors_are_those_of_the_longest_known_context(texts, context):
    successors, reference = Successors(2, context), {}
    for number, text in enumerate(texts):
        rows = [[-1] * max(0, context - n) + text[max(0, n - context) : n] for n in range(1, len(text) + 1)]
        ranked = np.array([[number % 5, n % 5] for n in range(len(text))])
        successors.write(np.array(rows), ranked)
        for n in range(1, len(text) + 1):
            for length in range(1, min(context, n) + 1):
                reference[tuple(text[n - length : n])] = ranked[n - 1].tolist()
    for text in texts:
        for n in range(1, len(text) + 1):
            length = max(k for k in range(1, min(context, n) + 1) if tuple(text[n - k : n]) in reference)
            assert successors.find(text[:n]) == (length - 1, reference[tuple(text[n - length : n])])
    assert Successors(2, context).find([1, 2, 3]) is None


def test_a_context_in_the_way_is_forgotten_not_mistaken():
    successors, rng = Successors(1, 2), np.random.default_rng(0)
    pairs = rng.integers(0, 1000, (400_000, 2))  # three for every slot
    successors.write(pairs, (pairs[:, :1] * 7 + pairs[:, 1:]) % 1000)
    found = [(successors.find(pair), pair) for pair in pairs[:2000].tolist()]
    pairs_known = [(hit[1][0], (a * 7 + b) % 1000) for hit, (a, b) in found if hit is not None and hit[0] == 1]
    assert 20 < len(pairs_known) < 1000
    assert all(one == other for one, other in pairs_known)


@given(st.integers(1, 80), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_published_tree_drafts_what_the_table_says(nodes, k, seed):
    recycling, table = filled({"nodes": nodes, "k": k, **PUBLISHED}, seed=seed)
    tree = recycling.propose([[3, 4], [7]], nodes)
    assert tree.width == min(nodes, sum(max(path) < k for path in rank_paths())) + 1
    for row, root in enumerate((4, 7)):
        assert tree.ids[row, 0] == root
        for node in range(1, tree.width):
            rank = recycling._drawn[row].ranks[node]
            assert tree.ids[row, node] == table[tree.ids[row, tree.parents[row, node]], rank]
        siblings = list(zip(tree.parents[row], recycling._drawn[row].ranks, strict=True))
        assert len(set(siblings)) == tree.width


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_grown_tree_holds_the_likeliest_nodes(nodes, k, seed):
    """Against all rank paths of up to three steps, sorted by the product of their chances."""
    recycling, table = filled({"k": k, "context": 1}, vocab=20, seed=seed)
    chances = np.sort(np.random.default_rng(seed).uniform(0.01, 0.4, (1, k)))[:, ::-1].tolist()
    draft = grow(recycling.successors, [3], chances, nodes, 0.0)
    paths = [(a,) for a in range(k)]
    for _ in range(nodes):
        paths += [(*path, a) for path in paths for a in range(k) if (*path, a) not in paths and len(path) < 3]
        if len(paths) > 100:
            break
    best = sorted((float(np.prod([chances[0][rank] for rank in path])) for path in set(paths)), reverse=True)
    deep = [node for node in range(1, len(draft.ids)) if len(path_of(draft, node)) <= 3]
    assert len(draft.ids) == nodes + 1
    assert np.allclose([draft.chances[node] for node in deep], best[: len(deep)]) or len(deep) < nodes
    assert all(one >= other for one, other in pairwise(draft.chances))
    for node in range(1, len(draft.ids)):
        assert draft.ids[node] == table[draft.ids[draft.parents[node]], draft.ranks[node]]


def path_of(draft, node):
    path = []
    while node:
        path.append(draft.ranks[node])
        node = draft.parents[node]
    return path


def test_a_tree_grows_where_it_was_accepted():
    recycling, _ = filled({"nodes": 6, "k": 3, "context": 1})
    before = recycling.chances
    shapes = []
    for _ in range(40):  # only the first candidate is ever right
        tree = recycling.propose([[7]], 6)
        shapes.append(int(tree.depth.max()))
        first = [node for node in range(tree.width) if not any(path_of(recycling._drawn[0], node))]
        recycling.observe(tree, Scores(torch.zeros(1, tree.width, 50)), [first])
    after = recycling.chances
    assert after[0, 0] > before[0, 0] and (after[0, 1:] < before[0, 1:]).all()
    assert (np.diff(after, axis=1) <= 0).all()
    assert shapes[0] < shapes[-1] == 6


def test_recycling_learns_from_rejected_nodes_and_the_last_writer_wins():
    logits = torch.randn(1, 4, 200, generator=torch.Generator().manual_seed(2))
    tree = TokenTree(np.array([[5, 9, 5, 7]]), np.array([[-1, 0, 0, 1]]))
    expected = logits[0].argsort(-1, descending=True)[:, :8].tolist()
    everything = TokenRecycling(nodes=3, **PUBLISHED)
    accepted = TokenRecycling(nodes=3, recycle="accepted", **PUBLISHED)
    for recycling in (everything, accepted):
        recycling.start([[1, 5]])
        recycling.observe(tree, Scores(logits), [[0, 1]])
    assert table_of(everything) == {5: expected[2], 9: expected[1], 7: expected[3]}
    assert table_of(accepted) == {5: expected[0], 9: expected[1]}


def test_nodes_are_learned_behind_the_tokens_that_led_to_them():
    logits = torch.randn(1, 4, 200, generator=torch.Generator().manual_seed(2))
    tree = TokenTree(np.array([[5, 9, 5, 7]]), np.array([[-1, 0, 0, 1]]))
    expected = logits[0].argsort(-1, descending=True)[:, :8].tolist()
    recycling = TokenRecycling()
    recycling.start([[1, 5]])
    recycling.observe(tree, Scores(logits), [[0, 1]])
    contexts = ([1, 5], [1, 5, 9], [1, 5, 5], [5, 9, 7])
    for node, context in enumerate(contexts):
        assert recycling.successors.find(context) == (len(context) - 1, expected[node])
    assert recycling.successors.find([8, 8, 9]) == (0, expected[1])


def test_recycling_warms_up_and_stays_lossless():
    model = tiny_lm(seed=5).model
    plain = decode(model, PROMPTS)
    for options in ({"prompt": False}, {"nodes": 30, **PUBLISHED}):
        recycling = TokenRecycling(**options)
        cold, warm = decode(model, PROMPTS, recycling), decode(model, PROMPTS, recycling)
        for sequences in (cold, warm):
            assert [s.new_ids for s in sequences] == [s.new_ids for s in plain]
        passes = [sum(s.trace.passes for s in sequences) for sequences in (warm, cold, plain)]
        assert passes[0] < passes[1] < passes[2]


def test_recycling_may_learn_from_the_prompt():
    recycling, plain = TokenRecycling(k=2), TokenRecycling(k=2, prompt=False)
    for method in (recycling, plain):
        method.start([[1, 2, 1, 3, 1, 4], [7, 8]])
    assert table_of(plain) == {}
    assert table_of(recycling) == {1: [4, 3], 2: [1, -1], 3: [1, -1], 7: [8, -1]}
    assert recycling.successors.find([1, 2, 1]) == (2, [3])
    assert recycling.successors.find([9, 9, 1]) == (0, [4, 3])
    assert recycling.successors.find([4]) is None
    assert recycling.propose([[1, 2]], 3).ids.tolist() == [[2, 1, 3, 1]]


def test_options_are_checked():
    assert TokenRecycling(nodes="12").options["nodes"] == 12
    for wrong in ({"nodes": 81}, {"context": 4}, {"tree": "oak"}):
        with pytest.raises(OptionError):
            TokenRecycling(**wrong)
    with pytest.raises(UnknownNameError, match="nodes"):
        TokenRecycling(node=3)
    with pytest.raises(OptionError):
        TokenRecycling().prepare(5, None)
