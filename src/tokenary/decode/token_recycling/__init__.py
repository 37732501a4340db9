"""Token Recycling (Luo et al. 2024, arXiv 2408.08696).

Every pass ranks the whole vocabulary at every position, and all but one entry is thrown away. Keep the top k next
tokens of every token that was ever an input in a table M of |V| x k ids. To draft, expand M from the newest token
along a tree; afterwards write the fresh top k of *all* nodes, accepted or not, back.

    draft:   x[child] = M[x[parent], rank(child)]
    update:  M[x[i]]  = top-k(logits[i])   for every node i

M holds no probabilities and belongs to no text: it survives from prompt to prompt and warms up.

The paper's tree is fixed, has 80 nodes and reads M by single tokens, which is
``tree=published,nodes=80,context=1,prompt=false``. It pays where 80 nodes cost as much as one. Where every node costs
time, the default does better with a handful: M also knows longer contexts and learns from the prompt, and the tree
grows along the paths that were accepted so far, as far as they pay. These are our additions, each with its switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.errors import OptionError
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Proposer
from tokenary.decode.scores import Scores
from tokenary.decode.token_recycling.successors import Successors
from tokenary.decode.token_recycling.trees import Draft, expand, grow, rank_paths, unlikeliness
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

FADE = 0.998  # of the evidence of acceptance, a pass
LEAST = 0.02  # chance of a node below which no draft pays


class TokenRecycling(Proposer):
    """Drafts a tree from a table of the top-k successors of every token.

    Parameters
    ----------
    nodes : int or "auto"
        Nodes of the draft, up to the 80 of the paper; ``auto`` chooses by measured cost and acceptance.
    k : int
        Successors stored a token.
    context : int
        Longest run of tokens that successors are stored for; where it is unknown, shorter ones are looked up. The
        paper's is 1.
    tree : {"grown", "published"}
        ``grown`` adds the node that is likeliest to be accepted, by how often nodes of its rank were, one after the
        other; ``published`` is the paper's, of which small drafts take the likeliest paths.
    recycle : {"all", "accepted"}
        Whether rejected nodes are written back too; ``accepted`` is the paper's ablation.
    prompt : bool
        Also learn, from the prompt, which token follows which. The paper does not.
    """

    def __init__(
        self,
        nodes: Annotated[int, Field(ge=1, le=80)] | Literal["auto"] = "auto",
        k: Annotated[int, Field(ge=1, le=8)] = 8,
        context: Annotated[int, Field(ge=1, le=3)] = 3,
        tree: Literal["grown", "published"] = "grown",
        recycle: Literal["all", "accepted"] = "all",
        prompt: bool = True,
    ) -> None:
        self.recycle, self.prompt, self.grown = recycle, prompt, tree == "grown"
        self._paths = sorted((path for path in rank_paths() if max(path) < k), key=unlikeliness)
        self.successors = Successors(k, context)
        self._hits, self._trials = np.zeros((context, k)), np.zeros((context, k))
        self._drawn: list[Draft] = []
        self._contexts: Sequence[Sequence[int]] = []
        most = 80 if self.grown else len(self._paths)
        self.width = DraftWidth(most, None if nodes == "auto" else min(nodes, most), judged=self.grown)

    def prepare(self, vocab_size: int, tokenizer: Any | None) -> None:
        """Refuse a vocabulary smaller than k."""
        if self.successors.k > vocab_size:
            raise OptionError("k", self.successors.k, f"at most the {vocab_size} tokens of the vocabulary")

    def start(self, contexts: Sequence[Sequence[int]]) -> None:
        """Begin with a new batch; what was learned stays."""
        self._contexts = []
        self.join(contexts)

    def join(self, contexts: Sequence[Sequence[int]]) -> None:
        """Go on with these sequences too."""
        self._contexts, self._drawn = [*self._contexts, *contexts], []
        for prompt in contexts if self.prompt else ():
            for end in range(1, len(prompt)):
                self.successors.lead(prompt[max(0, end - self.successors.context) : end], prompt[end])

    @property
    def chances(self) -> np.ndarray:
        """Estimated share of accepted nodes, by how much context was known and by rank, (context, k)."""
        prior = 0.5 / np.arange(1, self.successors.k + 1)
        return np.minimum.accumulate((self._hits + 4 * prior) / (self._trials + 4), axis=1)

    def propose(self, contexts: Sequence[Sequence[int]], nodes: int) -> TokenTree:
        """Expand the successors of each newest token."""
        self._contexts = contexts
        if self.grown:
            chances = self.chances.tolist()
            least = 0.0 if self.width.fixed else LEAST
            self._drawn = [grow(self.successors, context, chances, nodes, least) for context in contexts]
            size = 1 + min(nodes, self.width.cut([draft.chances[1:] for draft in self._drawn]))
            self._drawn = [draft.first(size) for draft in self._drawn]
        else:
            paths = self._paths[:nodes]
            self._drawn = [expand(self.successors, context, paths) for context in contexts]
        return TokenTree.stack([(draft.ids, draft.parents) for draft in self._drawn])

    def observe(self, tree: TokenTree, scores: Scores, paths: Sequence[Sequence[int]]) -> None:
        """Learn the fresh successors, where a context occurs twice those of the last node; and what was accepted."""
        fresh, length = scores.top_k(self.successors.k), self.successors.context
        before = np.full((*tree.ids.shape, length), -1)
        rows = np.arange(len(tree.ids))
        for row, context in enumerate(self._contexts):
            known = context[-length:]  # the last one is the root
            before[row, 0, length - len(known) :] = known
        for node in range(1, tree.width):
            above = before[rows, tree.parents[:, node]]
            before[:, node] = np.concatenate([above[:, 1:], tree.ids[:, node, None]], axis=1)
        real = np.arange(tree.width) < tree.sizes[:, None]
        if self.recycle == "accepted":
            for row, path in enumerate(paths):
                real[row] = np.isin(np.arange(tree.width), path)
        self.successors.write(before[real], fresh[real])
        self._hits *= FADE
        self._trials *= FADE
        for draft, path in zip(self._drawn, paths, strict=False):  # none were drawn for a pass without a draft
            accepted = set(path)
            for node in range(1, len(draft.ids)):
                if draft.parents[node] in accepted:
                    self._trials[draft.orders[node], draft.ranks[node]] += 1
                    self._hits[draft.orders[node], draft.ranks[node]] += node in accepted

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the contexts of these sequences."""
        self._contexts = [self._contexts[row] for row in rows]
        self._drawn = []
