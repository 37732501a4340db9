"""Token Recycling: once warm, more tokens a pass than prompt lookup on text that copies nothing, and the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenary.claims.drafting import differences, draft
from tokenary.core.claim import Claim, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.core.tree import TokenTree
from tokenary.data import prompts
from tokenary.decode.prompt_lookup import PromptLookup
from tokenary.decode.scores import Scores
from tokenary.decode.token_recycling import TokenRecycling
from tokenary.run import load

SMALL = 15  # nodes of a draft that pays on a CPU
WARM_UP = 3  # prompts whose passes are not counted


#: The published method; without these options Tokenary adds longer contexts, prompts and a tree that grows.
PUBLISHED: dict[str, Any] = {"tree": "published", "context": 1, "prompt": False}


class RandomRecycling(TokenRecycling):
    """The control: a small tree, filled from a table of random tokens that never learns."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        super().__init__(nodes=SMALL, **PUBLISHED)
        ranked = substream(seed, "random-table").integers(0, vocab_size, (vocab_size, self.successors.k), np.int32)
        self.successors.write(np.arange(vocab_size)[:, None], ranked)

    def observe(self, tree: TokenTree, scores: Scores, paths: Sequence[Sequence[int]]) -> None:
        """Learn nothing."""


def run(
    seed: int = 0,
    sets: Sequence[str] = ("chat", "code", "writing"),
    count: int = 9,
    max_new_tokens: int = 96,
    shuffled: bool = False,
) -> Outcome:
    """Measure tokens a pass on prompts that invite no copying, in float32.

    Parameters
    ----------
    seed : int
        Of the order of the prompts and of the random control.
    sets : sequence of str
        Prompt sets; only their hostile prompts, which leave little to copy, are counted.
    count : int
        Prompts that are counted.
    max_new_tokens : int
        Tokens a prompt.
    shuffled : bool
        Mix the sets, so that the domain switches at every prompt.
    """
    lm = load("smollm2", dtype="float32")
    chosen = [prompt.prompt for name in sets for prompt in prompts(set=name, workload="hostile")]
    if shuffled:
        substream(seed, "order").shuffle(chosen)
    warm_up = [prompts(set=name, workload="friendly")[0].prompt for name in sets][:WARM_UP]
    ids = lm.encode([*warm_up, *chosen[:: max(1, len(chosen) // count)][:count]])
    skip = len(warm_up)
    plain = draft(lm, ids, None, max_new_tokens)
    recycling = draft(lm, ids, TokenRecycling(nodes=80, **PUBLISHED), max_new_tokens)
    small = draft(lm, ids, TokenRecycling(nodes=SMALL, **PUBLISHED), max_new_tokens)
    accepted = draft(lm, ids, TokenRecycling(nodes=SMALL, recycle="accepted", **PUBLISHED), max_new_tokens)
    grown = draft(lm, ids, TokenRecycling(nodes=SMALL), max_new_tokens)
    lookup = draft(lm, ids, PromptLookup(nodes=10), max_new_tokens)
    random = draft(lm, ids, RandomRecycling(seed, lm.vocab_size), max_new_tokens)
    return Outcome(
        method=recycling.figure("token-recycling", skip),
        baseline=lookup.figure("prompt-lookup", skip),
        controls=(plain.figure("none", skip), random.figure("random", skip)),
        n=len(ids) - skip,
        paired_spread=standard_error(recycling.rates(skip) - lookup.rates(skip)),
        details={
            "first_prompt": recycling.sequences[0].trace.tokens_per_pass,
            "by_prompt": [round(s.trace.tokens_per_pass, 3) for s in recycling.sequences],
            f"with_{SMALL}_nodes": small.figure("", skip).value,
            f"with_{SMALL}_nodes_recycling_only_accepted_ones": accepted.figure("", skip).value,
            f"with_{SMALL}_nodes_and_our_additions": grown.figure("", skip).value,
            **differences(lm, recycling, plain),
        },
    )


CLAIM = Claim(
    slug="token-recycling",
    statement="Once warm, Token Recycling with the published tree yields at least 1.25 times the tokens a pass of "
    "prompt lookup on prompts that invite no copying, and the same text as greedy decoding",
    metric="tokens a pass",
    direction="higher",
    threshold=1.25,
    run=run,
    variation="French, German and summarising prompts, in an order that switches the domain at random",
    held_out={"sets": ("french", "german", "summarise"), "shuffled": True},
    minutes=20,
    fast={"sets": ("chat", "code"), "count": 3, "max_new_tokens": 24},
)
