"""Token Recycling (Luo et al. 2024, arXiv 2408.08696).

Every pass ranks the whole vocabulary at every position, and all but one entry is thrown away. Keep the top k next
tokens of every token that was ever an input in a table M of |V| x k ids. To draft, expand M from the newest token
along a fixed, imbalanced tree of rank paths; afterwards write the fresh top k of *all* nodes, accepted or not, back.

    draft:   x[child] = M[x[parent], rank(child)]
    update:  M[x[i]]  = top-k(logits[i])   for every node i

M holds no probabilities and belongs to no text: it survives from prompt to prompt and warms up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Proposer
from tokenary.decode.scores import Scores, top_k
from tokenary.decode.width import DraftWidth

CARD = Card(
    slug="token-recycling",
    cls="TokenRecycling",
    room="decode",
    slot="draft",
    title="Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    summary="drafts from the candidates that earlier passes ranked and threw away; no draft model, no corpus",
    paper="2408.08696",
    year=2024,
    code="Luowaterbi/TokenRecycling",
    lossless=True,
    requires=("kv-cache",),
)

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


def _unlikeliness(path: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    return sum(1 + 1.5 * math.log2(1 + rank) for rank in path), path


class TokenRecycling(Proposer):
    """Drafts a tree from a table of the top-k successors of every token.

    Parameters
    ----------
    nodes : int or "auto"
        Nodes of the draft, up to the 80 of the paper; ``auto`` chooses by measured cost and acceptance.
    k : int
        Successors stored a token.
    recycle : {"all", "accepted"}
        Whether rejected nodes are written back too; ``accepted`` is the paper's ablation.
    prompt : bool
        Also learn from the candidates behind every token of the prompt. The paper does not; it costs the prompt's
        logits, and lets small drafts, which learn little by themselves, be accepted more.
    """

    def __init__(
        self,
        nodes: Annotated[int, Field(ge=1, le=80)] | Literal["auto"] = "auto",
        k: Annotated[int, Field(ge=1, le=8)] = 8,
        recycle: Literal["all", "accepted"] = "all",
        prompt: bool = True,
    ) -> None:
        self.k, self.recycle, self.reads_prompts = k, recycle, prompt
        self._prompts: Sequence[Sequence[int]] = []
        # Smaller drafts keep the likeliest paths: acceptance falls with every step and with the logarithm of its rank.
        paths = sorted((path for path in rank_paths() if max(path) < k), key=_unlikeliness)
        index = {path: node for node, path in enumerate(paths, start=1)} | {(): 0}
        self._parents = np.array([-1] + [index[path[:-1]] for path in paths])
        self._ranks = np.array([0] + [path[-1] for path in paths])
        self._depth = np.array([0] + [len(path) for path in paths])
        self.table: np.ndarray | None = None  # (V, k); a row of zeros drafts token 0, which is harmless
        self.width = DraftWidth(len(paths), None if nodes == "auto" else min(nodes, len(paths)))

    def prepare(self, vocab_size: int, tokenizer: Any | None) -> None:
        """Refuse a vocabulary smaller than k."""
        if self.k > vocab_size:
            raise OptionError("k", self.k, f"at most the {vocab_size} tokens of the vocabulary")

    def start(self, contexts: Sequence[Sequence[int]]) -> None:
        """Begin with a new batch; the table stays."""
        self._prompts = contexts

    def observe_prompt(self, row: int, start: int, logits: Tensor) -> None:
        """Write the successors of a prompt's tokens into the table."""
        tokens = np.asarray(self._prompts[row][start : start + len(logits)])
        self._learn(tokens, top_k(logits, self.k).cpu().numpy(), logits.shape[-1])

    def propose(self, contexts: Sequence[Sequence[int]], nodes: int) -> TokenTree:
        """Expand the table from each newest token, one depth at a time."""
        size = min(nodes + 1, len(self._parents))
        parents, ranks, depth = self._parents[:size], self._ranks[:size], self._depth[:size]
        ids = np.zeros((len(contexts), size), np.int64)
        ids[:, 0] = [context[-1] for context in contexts]
        if self.table is not None:
            for level in range(1, depth.max() + 1):
                at = depth == level
                ids[:, at] = self.table[ids[:, parents[at]], ranks[at]]
        return TokenTree(ids, np.repeat(parents[None], len(contexts), axis=0))

    def observe(self, tree: TokenTree, scores: Scores, paths: Sequence[Sequence[int]]) -> None:
        """Write the fresh successors back; where a token occurs twice the last node wins."""
        fresh, vocab_size = scores.top_k(self.k), scores.logits.shape[-1]
        if self.recycle == "all":
            self._learn(tree.ids.ravel(), fresh.reshape(-1, self.k), vocab_size)
        else:
            for row, path in enumerate(paths):
                self._learn(tree.ids[row, path], fresh[row, path], vocab_size)

    def _learn(self, tokens: np.ndarray, successors: np.ndarray, vocab_size: int) -> None:
        """Write the successors (n, k) of tokens (n,)."""
        if self.table is None:
            self.table = np.zeros((vocab_size, self.k), np.int32)
        self.table[tokens] = successors
