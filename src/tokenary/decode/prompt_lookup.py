"""Prompt lookup: the baseline of drafting (as in ``generate(prompt_lookup_num_tokens=...)``).

Find the newest earlier place where the last n tokens already stood and draft what followed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.tree import TokenTree
from tokenary.decode.base import Proposer
from tokenary.decode.width import DraftWidth

CARD = Card(
    slug="prompt-lookup",
    cls="PromptLookup",
    room="decode",
    slot="draft",
    title="Prompt lookup decoding",
    summary="drafts what followed the last tokens where they stood before; pays on copying, never harms by much",
    year=2023,
    lossless=True,
    requires=("kv-cache",),
    baseline=True,
)


class PromptLookup(Proposer):
    """Drafts a chain copied from the sequence's own past.

    Parameters
    ----------
    nodes : int or "auto"
        Tokens of the draft.
    ngram : int
        Longest run of tokens to look for; shorter ones follow.
    """

    def __init__(
        self,
        nodes: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = "auto",
        ngram: Annotated[int, Field(ge=1, le=16)] = 3,
    ) -> None:
        self.ngram = ngram
        self.width = DraftWidth(32 if nodes == "auto" else nodes, None if nodes == "auto" else nodes)

    def propose(self, contexts: Sequence[Sequence[int]], nodes: int) -> TokenTree:
        """Copy up to `nodes` tokens; where nothing matches the tree is its root."""
        return TokenTree.chains([[context[-1], *find(context, self.ngram, nodes)] for context in contexts])


def find(context: Sequence[int], ngram: int, nodes: int) -> list[int]:
    """Return what followed the last earlier occurrence of the longest matching tail.

    Parameters
    ----------
    context : sequence of int
        All tokens so far.
    ngram : int
        Longest tail to match; tails down to one token are tried.
    nodes : int
        Most tokens to return.
    """
    ids = np.asarray(context)
    for n in range(min(ngram, len(ids) - 1), 0, -1):
        # Starts of windows that end before the last token.
        match = np.ones(len(ids) - n, bool)
        for offset in range(n):
            match &= ids[offset : offset + len(match)] == ids[len(ids) - n + offset]
        starts = np.flatnonzero(match)
        if len(starts):
            return ids[starts[-1] + n : starts[-1] + n + nodes].tolist()
    return []
