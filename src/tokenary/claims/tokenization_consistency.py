"""Tokenization consistency: where no encoding of a target can be written, it is replaced, and not lost."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tokenary.core.claim import Claim, Figure, Outcome
from tokenary.probe.tokenization_consistency import TokenizationConsistency
from tokenary.probe.tokenization_consistency.codec import Codec
from tokenary.probe.tokenization_consistency.injection import sensitivity
from tokenary.probe.tokenization_consistency.likelihood import mean_mass
from tokenary.probe.tokenization_consistency.masking import What
from tokenary.probe.tokenization_consistency.outcomes import Answer, Tally, wilson
from tokenary.probe.tokenization_consistency.trials import (
    MASKED,
    RANDOM,
    SAMPLED,
    answer_all,
    over_banned,
    place_of,
)
from tokenary.run import load


def counts(answers: list[Answer], outcome: str) -> np.ndarray:
    """Count one outcome in each answer."""
    return np.array([sum(edit.outcome == outcome for edit in answer.edits) for answer in answers], float)


def spread(values: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of sum(values) / sum(sizes), the targets of one passage taken together."""
    share = values.sum() / sizes.sum()
    return float(np.sqrt(len(values) / max(1, len(values) - 1) * ((values - share * sizes) ** 2).sum()) / sizes.sum())


def run(
    seed: int = 0, trials: int = 150, words: int = 24, text: Literal["prose", "code"] = "prose", priced: int = 32
) -> Outcome:
    """Ask for replacements without a mask, with it and with a random one, the same random numbers in each, in float32.

    Phantoms may be too rare to be seen. Replaced targets must therefore rise by the upper end of the 95% interval of
    the share of phantoms without a mask, not by the share that was seen. One phantom under the mask counts as no rise.

    Parameters
    ----------
    seed : int
        Draws passages, targets and tokens.
    trials, words : int
        Passages, and most words of one.
    text : {"prose", "code"}
        Where they come from.
    priced : int
        Targets at which the probability of all encodings is measured.
    """
    lm = load("smollm2", dtype="float32")
    probe, codec = TokenizationConsistency(trials=trials, words=words, text=text), Codec(lm)
    source = probe.source(seed)
    asked = probe.draw(lm, codec, source, seed)
    arms: dict[str, What | None] = {SAMPLED: None, MASKED: "surface", RANDOM: "surface"}
    judged = answer_all(lm, codec, asked, arms, probe.sampler(seed), lambda done: None)
    places = [place for trial in asked if (place := place_of(codec, trial)) is not None][:priced]
    sizes = np.array([len(answer.edits) for answer in judged[SAMPLED]], float)
    plain = counts(judged[SAMPLED], "replaced")
    phantoms, left = (int(counts(judged[arm], "phantom").sum()) for arm in (SAMPLED, MASKED))

    def rise(arm: str) -> Figure:
        gain = counts(judged[arm], "replaced") - plain
        return Figure(arm, float(gain.sum() / sizes.sum()), spread(gain, sizes))

    masked, drawn = rise(MASKED), rise(RANDOM)
    gained = counts(judged[MASKED], "replaced") - counts(judged[RANDOM], "replaced")
    return Outcome(
        method=Figure("masked, phantoms left", 0.0) if left else masked,
        baseline=Figure("share of phantoms, upper end", wilson(phantoms, int(sizes.sum()))[1]),
        controls=(Figure("none", 0.0), Figure("random", drawn.value, drawn.spread)),
        n=int(sizes.sum()),
        runs=1,
        paired_spread=masked.spread,
        details={
            "arms": {arm: Tally(found).figures() for arm, found in judged.items()},
            "masked over random": {"value": masked.value - drawn.value, "spread": spread(gained, sizes)},
            "probability": mean_mass(lm, places, lambda done: None),
            "over_banned": over_banned(codec, asked, source),
            "sensitivity": sensitivity(codec, [trial.plain for trial in asked], seed),
        },
    )


CLAIM = Claim(
    slug="tokenization-consistency",
    statement="With every encoding of a target masked no phantom edit is left, and the share of replaced targets rises "
    "by at least the share of phantoms without the mask, taken at the upper end of its 95% interval",
    metric="rise of the share of replaced targets over no mask",
    direction="higher",
    threshold=0.0,
    run=run,
    effect="difference",
    variation="identifiers in lines of Python instead of words in sentences",
    held_out={"text": "code", "trials": 70},
    minutes=5,
    fast={"trials": 8, "words": 16, "priced": 4},
)
