"""ADED: adaptive draft-verification (arXiv 2407.12021).

A trigram table P(c | a, b), counted from real text, stands in for the model. Each step (1) nudges the trigrams of the
last 16 tokens up, so that the table drifts towards the text being written; (2) searches the table for likely
continuations by Monte-Carlo tree search, which trades likely paths against rarely visited ones; (3) has the model
verify them in one pass.

    score(a, b, c) <- min(score(a, b, c) + 0.04, 3)                      for every trigram in the last 16 tokens
    value(child)   =  Q / N + (32 + ln((N_parent + 9) / 8)) score sqrt(N_parent) / (1 + N)
    reward(path)   =  1 + sum of the scores of its trigrams              4 states a path, 150 iterations

Where this differs from the published code:

- That code sums, by an index slip, the scores of the wrong tokens as reward; ``compat_reward`` brings the slip back.
- Its table drifts for good, over all texts of a process. Here each sequence drifts from the counted table alone, so
  that drafts depend neither on neighbours in a batch nor on earlier calls; ``drift="shared"`` is the published way.
- Its order of successors is that of a hash map, that is, random; here the likeliest comes first.
- It drops the paths with most distinct tokens until 64 are left. The 24 paths merged into one tree never exceed 46
  nodes; a smaller budget cuts the least visited nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tokenary.core.card import Card
from tokenary.core.errors import InputError, OptionError
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.decode.aded.drift import Drift
from tokenary.decode.aded.search import ITERATIONS, MOST, STATES, beam, mcts
from tokenary.decode.aded.store import TrigramStore, build_store, builtin_store, count_text
from tokenary.decode.base import Proposer
from tokenary.decode.width import DraftWidth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = Card(
    slug="aded",
    cls="ADED",
    room="decode",
    title="Adaptive Draft-Verification for Efficient Large Language Model Decoding",
    summary="drafts by tree search over a trigram table that adapts to the text being written",
    slot="draft",
    paper="2407.12021",
    year=2024,
    code="liuxukun2000/Adaptix",
    lossless=True,
    requires=("kv-cache",),
)

__all__ = ["ADED", "CARD", "TrigramStore", "build_store", "count_text"]


class ADED(Proposer):
    """Drafts by searching a trigram table that drifts towards the text being written.

    Parameters
    ----------
    nodes : int or "auto"
        Most drafted tokens a pass; a searched tree has at most 46. "auto" chooses by measured cost and acceptance.
    store : str
        File saved by `TrigramStore.save`, counted with the model's own tokenizer; "none" to start from an empty table;
        "builtin" to count, once a tokenizer, the prose that ships with Tokenary and 4 MB of Python's standard library;
        "auto" is "builtin" where the tokenizer is known, else "none".
    adaptive : bool
        Let the table drift; without it this is a static trigram drafter.
    search : {"mcts", "beam"}
        "beam" takes the likeliest paths of the same table instead, at most as many nodes.
    drift : {"sequence", "shared"}
        Whether each sequence drifts on its own, or all sequences of all calls together.
    compat_reward : bool
        Sum rewards with the index slip of the published code.
    seed : int
        Names the random numbers of the search; it changes drafts, never what is generated.

    Raises
    ------
    OptionError
        If an option is out of range, or `store` is no readable store.
    """

    def __init__(
        self,
        nodes: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = "auto",
        store: Annotated[str, Field(json_schema_extra={"remote": ["auto", "builtin", "none"]})] = "auto",
        adaptive: bool = True,
        search: Literal["mcts", "beam"] = "mcts",
        drift: Literal["sequence", "shared"] = "sequence",
        compat_reward: bool = False,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.width = DraftWidth(MOST) if nodes == "auto" else DraftWidth(nodes, fixed=nodes)
        self.adaptive, self.search, self.compat_reward, self.seed = adaptive, search, compat_reward, seed
        self._source, self._share = store, drift == "shared"
        try:
            self.store = build_store([]) if store in ("none", "auto", "builtin") else TrigramStore.load(store)
        except InputError as error:
            raise OptionError("store", store, f"auto, builtin, none or a saved trigram store ({error})") from None
        self._shared = Drift(self.store) if self._share else None
        self._drifts: list[Drift] = []

    def prepare(self, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Count or load the built-in store; refuse a store of another tokenizer.

        Raises
        ------
        OptionError
            If the store can draft tokens that the model lacks, or "builtin" was asked for without a tokenizer.
        """
        if self._source == "builtin" and tokenizer is None:
            raise OptionError("store", "builtin", "a model whose tokenizer is known")
        if self._source in ("auto", "builtin") and tokenizer is not None:
            self.store = builtin_store(tokenizer)
            self._shared = Drift(self.store) if self._share else None
        if self.store.largest_token >= vocab_size:
            raise OptionError(
                "store", self._source, f"a store counted with this model's tokenizer ({vocab_size} tokens)"
            )

    def start(self, contexts: Sequence[Sequence[int]]) -> None:
        """Begin from the counted table, or from the shared one as it has become."""
        self._drifts = []
        self.join(contexts)

    def join(self, contexts: Sequence[Sequence[int]]) -> None:
        """Go on with these sequences, each from the counted table."""
        self._drifts += [self._shared or Drift(self.store) for _ in contexts]

    def propose(self, contexts: Sequence[Sequence[int]], nodes: int) -> TokenTree:
        """Let the table drift by one step, then search it."""
        trees = []
        for context, drift in zip(contexts, self._drifts, strict=True):
            if self.adaptive:
                drift.touch(context)
            trees.append(self._draft(context, drift, min(nodes, MOST)))
        return TokenTree.stack(trees)

    def _draft(self, context: Sequence[int], drift: Drift, nodes: int) -> tuple[list[int], list[int]]:
        """Search for the continuations of one context; return (ids, parents)."""
        if len(context) < 2:
            return [context[-1]], [-1]
        if self.search == "beam":
            ids, parents = beam(drift.table, context[-2], context[-1], STATES, nodes)
        else:
            # Named by the position alone: a sequence is drafted alike in every batch.
            uniforms = substream(self.seed, "aded", len(context)).random((ITERATIONS, STATES - 1))
            ids, parents = mcts(drift.table, context[-2], context[-1], uniforms, nodes, self.compat_reward)
        return ids.tolist(), parents.tolist()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep the drift of these sequences."""
        self._drifts = [self._drifts[row] for row in rows]
