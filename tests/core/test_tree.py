"""Draft trees against their slow, obvious definition."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenary.core.tree import TokenTree


@st.composite
def trees(draw):
    """A ragged batch: for each sequence (ids, parents)."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 9))
        parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, size)]
        made.append(([draw(st.integers(0, 5)) for _ in range(size)], parents))
    return made


def line(parents, node):
    """Node and all above it."""
    found = [node]
    while parents[node] >= 0:
        node = parents[node]
        found.append(node)
    return found


@given(trees())
def test_depth_ancestors_sizes_and_children(rows):
    batch = TokenTree.stack(rows)
    assert batch.ids.shape == batch.parents.shape == (len(rows), max(len(ids) for ids, _ in rows))
    assert batch.width == batch.ids.shape[1]
    assert batch.sizes.tolist() == [len(ids) for ids, _ in rows]
    for row, (ids, parents) in enumerate(rows):
        for node in range(len(ids)):
            above = line(parents, node)
            assert batch.depth[row, node] == len(above) - 1
            assert np.flatnonzero(batch.ancestors[row, node]).tolist() == sorted(above)
            for token in range(6):
                children = [n for n in range(len(ids)) if parents[n] == node and ids[n] == token]
                assert batch.child(row, node, token) == (children[0] if children else -1)
        for node in range(len(ids), batch.width):  # padding sees itself alone
            assert np.flatnonzero(batch.ancestors[row, node]).tolist() == [node]


@given(trees())
def test_the_first_nodes_are_a_tree_again(rows):
    whole = TokenTree.stack(rows)
    cut = TokenTree.stack([(ids[:3], parents[:3]) for ids, parents in rows])
    assert np.array_equal(whole.depth[:, : cut.width], cut.depth)
    assert np.array_equal(whole.ancestors[:, : cut.width, : cut.width], cut.ancestors)


def test_roots_and_chains():
    roots = TokenTree.roots([4, 5])
    assert (
        roots.ids.tolist() == [[4], [5]] and roots.parents.tolist() == [[-1], [-1]] and roots.sizes.tolist() == [1, 1]
    )
    chains = TokenTree.chains([[4, 7, 8], [5]])
    assert chains.ids.tolist() == [[4, 7, 8], [5, 0, 0]]
    assert chains.parents.tolist() == [[-1, 0, 1], [-1, -1, -1]]
    assert chains.depth.tolist() == [[0, 1, 2], [0, 0, 0]] and chains.sizes.tolist() == [3, 1]
    assert chains.ids.dtype == chains.parents.dtype == np.int64
