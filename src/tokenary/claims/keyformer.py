"""Keyformer: with half the cache, its key tokens cost less quality than those of plain accumulated attention (H2O)."""

from __future__ import annotations

import numpy as np

from tokenary.bench.quality import evaluate, sliding_texts
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.data import prose, stdlib_code
from tokenary.run import load


def run(
    seed: int = 0,
    texts: int = 8,
    prompt_tokens: int = 768,
    new_tokens: int = 256,
    noise_seeds: int = 3,
    tau_end: float = 2.0,
    code: bool = False,
) -> Outcome:
    """Measure the rise of the loss over a full cache at 50% and 25% of the prompt, in float32, on real text.

    Parameters
    ----------
    seed : int
        Of the noise; chooses the code that is read.
    texts : int
        Pieces of text.
    prompt_tokens, new_tokens : int
        Of each piece: read as a prompt, then fed token by token.
    noise_seeds : int
        Runs of Keyformer that are averaged.
    tau_end : float
        Temperature that Keyformer ends at.
    code : bool
        Python source instead of prose.
    """
    lm = load("smollm2", dtype="float32")
    pieces = sliding_texts(lm, stdlib_code(seed, 200_000) if code else prose(), texts, prompt_tokens + new_tokens)
    full = evaluate(lm, None, pieces, prompt_tokens)

    def rise(recipe: str) -> np.ndarray:
        return np.array(evaluate(lm, recipe, pieces, prompt_tokens).nll) - np.array(full.nll)

    def at(keep: int) -> dict[str, np.ndarray]:
        keyformer = f"keyformer:keep={keep}%,tau_end={tau_end}"
        return {
            "keyformer": np.mean([rise(f"{keyformer},seed={seed + i}") for i in range(noise_seeds)], axis=0),
            "h2o": rise(f"keyformer:keep={keep}%,noise=none,tau_end=1"),
            "h2o with the same temperatures": rise(f"{keyformer},noise=none"),
            "random": rise(f"random:keep={keep}%,seed={seed}"),
            "recent": rise(f"recent:keep={keep}%"),
            "window": rise(f"recent:keep={keep}%,sinks=0"),
        }

    half, quarter = at(50), at(25)

    def figure(name: str) -> Figure:
        return Figure.of(name, half[name])

    return Outcome(
        method=figure("keyformer"),
        baseline=figure("h2o"),
        controls=(Figure("none", 0.0), figure("random"), figure("recent"), figure("window")),
        n=len(pieces),
        runs=noise_seeds,
        paired_spread=standard_error(half["keyformer"] - half["h2o"]),
        details={
            "full_nll": full.mean,
            "at_50%": {name: float(values.mean()) for name, values in half.items()},
            "at_25%": {name: float(values.mean()) for name, values in quarter.items()},
            "paired_spread_at_25%": standard_error(quarter["keyformer"] - quarter["h2o"]),
        },
    )


CLAIM = Claim(
    slug="keyformer",
    statement="With half of the prompt's cache, Keyformer raises the loss on real text at least 5% less than "
    "accumulated attention without noise and temperature (H2O with a recent window)",
    metric="rise of the negative log-likelihood over a full cache, nats a token",
    direction="lower",
    threshold=1.05,
    run=run,
    variation="Python source instead of prose, tau_end 4",
    held_out={"code": True, "tau_end": 4.0},
    minutes=30,
    fast={"texts": 2, "prompt_tokens": 256, "new_tokens": 64, "noise_seeds": 1},
)
