"""ADED: a trigram table that adapts to the text drafts better than the same table left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenary.claims.drafting import Drafted, differences, draft
from tokenary.core.claim import Claim, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.data import prompts, prose, stdlib_code
from tokenary.decode.aded import ADED, TrigramStore, build_store, count_text
from tokenary.decode.prompt_lookup import PromptLookup
from tokenary.run import load

NODES = 46  # the most that a search yields


def with_store(store: TrigramStore, **options: object) -> ADED:
    """Return the method over a store that is not in a file."""
    made = ADED(nodes=NODES, store="none", **options)  # type: ignore[arg-type]
    made.store = store
    return made


def randomised(store: TrigramStore, vocab_size: int, seed: int) -> TrigramStore:
    """The control: every successor replaced by a random token."""
    tokens = substream(seed, "random-store").integers(0, vocab_size, len(store.tokens)).astype(np.int32)
    return dataclasses.replace(store, tokens=tokens)


def run(
    seed: int = 0,
    sets: Sequence[str] = ("code", "chat", "summarise"),
    count: int = 8,
    max_new_tokens: int = 96,
    code_only: bool = False,
    megabytes: int = 10,
) -> Outcome:
    """Measure tokens a pass with and without adaptation, in float32, over one counted store.

    Parameters
    ----------
    seed : int
        Of the code that is counted, and of the random control.
    sets : sequence of str
        Prompt sets.
    count : int
        Prompts in all.
    max_new_tokens : int
        Tokens a prompt.
    code_only : bool
        Count the store on code alone.
    megabytes : int
        Code that is counted; none of it is in the prompts.
    """
    lm = load("smollm2", dtype="float32")
    assert lm.tokenizer is not None
    each = -(-count // len(sets))
    chosen = [prompt.prompt for name in sets for prompt in prompts(set=name)[:each]][:count]
    ids = lm.encode(chosen)
    code = stdlib_code(seed, megabytes * 1_000_000)
    store = count_text(lm.tokenizer, code if code_only else prose() + code)
    small = count_text(lm.tokenizer, (prose() + code)[:200_000])

    def arm(used: TrigramStore, **options: object) -> Drafted:
        return draft(lm, ids, with_store(used, **options), max_new_tokens)

    plain = draft(lm, ids, None, max_new_tokens)
    adaptive, static = arm(store), arm(store, adaptive=False)
    return Outcome(
        method=adaptive.figure("adaptive"),
        baseline=static.figure("static"),
        controls=(
            plain.figure("none"),
            arm(randomised(store, lm.vocab_size, seed), adaptive=False).figure("random"),
        ),
        n=len(ids),
        paired_spread=standard_error(adaptive.rates() - static.rates()),
        details={
            "by_prompt": [round(s.trace.tokens_per_pass, 3) for s in adaptive.sequences],
            "beam": arm(store, search="beam").figure("").value,
            "without_a_store": arm(build_store([])).figure("").value,
            "store_of_200_kB": arm(small).figure("").value,
            "store_bytes": store.nbytes,
            "prompt_lookup": draft(lm, ids, PromptLookup(nodes=10), max_new_tokens).figure("").value,
            **differences(lm, adaptive, plain),
        },
    )


CLAIM = Claim(
    slug="aded",
    statement="Letting the trigram table drift towards the text gains at least 0.1 tokens a pass over the same table "
    "left as it was counted, and the text is that of greedy decoding",
    metric="tokens a pass",
    direction="higher",
    threshold=0.1,
    effect="difference",
    run=run,
    variation="the table is counted on code alone, the prompts ask for prose",
    held_out={"sets": ("writing", "chat"), "code_only": True},
    minutes=20,
    fast={"count": 3, "max_new_tokens": 24, "megabytes": 1},
)
