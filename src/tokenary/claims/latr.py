"""LATR: its rollouts differ more from each other than samples that the model finds as likely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.sampling import Sampler
from tokenary.data import prompts
from tokenary.decode.latr import LATR, edit_distance, rouge_l
from tokenary.hf.strategy import Task
from tokenary.hf.target import attached
from tokenary.models import LM
from tokenary.run import load

BATCH = 8  # prompts


@dataclass(frozen=True)
class Rollouts:
    """New tokens of every branch of every prompt, and what one token costs on average.

    Parameters
    ----------
    groups : list of list of list of int
        Prompt, branch, token.
    log_prob : float
        Mean over all tokens, in nats, at temperature 1.
    fork_rate : float
        Forks a token while the trees grew.
    tree_steps : int
        Tokens after which the trees were left at the latest.
    """

    groups: list[list[list[int]]]
    log_prob: float
    fork_rate: float
    tree_steps: int

    def spread(self) -> np.ndarray:
        """Mean over the pairs of each prompt: edit distance over the longer length."""
        return np.array(
            [np.mean([edit_distance(a, b) / max(len(a), len(b)) for a, b in combinations(g, 2)]) for g in self.groups]
        )

    def summary(self) -> dict[str, float]:
        """Further figures."""
        pairs = [pair for group in self.groups for pair in combinations(group, 2)]
        grams = [[tuple(ids[at : at + 3]) for ids in group for at in range(len(ids) - 2)] for group in self.groups]
        return {
            "distance": float(self.spread().mean()),
            "log_prob": self.log_prob,
            "distinct_3_grams": float(np.mean([len(set(found)) / max(1, len(found)) for found in grams])),
            "distinct_texts": float(np.mean([len(set(map(tuple, group))) for group in self.groups])),
            "distinct_when_trees_are_left": float(
                np.mean([len({tuple(ids[: self.tree_steps]) for ids in group}) for group in self.groups])
            ),
            "pairs_with_rouge_l_above_half": float(np.mean([rouge_l(a, b) > 0.5 for a, b in pairs])),
            "tokens": float(np.mean([len(ids) for group in self.groups for ids in group])),
            "fork_rate": self.fork_rate,
        }


def write(lm: LM, ids: Sequence[Sequence[int]], method: LATR, new: int, temperature: float, seed: int) -> Rollouts:
    """Write every prompt's branches."""
    groups, weight, forks, grown = [], 0.0, 0, 0
    for at in range(0, len(ids), BATCH):
        sampler = Sampler(temperature, seed=seed, first_row=at)
        loop = method.loop(Task(lm.model, lm.tokenizer, ids[at : at + BATCH], sampler, new, lm.eos_token_ids))
        with attached(lm.model):
            for step, emissions in enumerate(loop):
                if step < method.tree_steps:
                    forks += sum(emission.copy_of is not None for emission in emissions)
                    grown += sum(emission.branch is not None for emission in emissions)
        groups += [[text.new_ids for text in row] for row in loop.branches]
        weight += sum(text.log_weight for row in loop.branches for text in row)
    tokens = sum(len(text) for group in groups for text in group)
    return Rollouts(groups, weight / tokens, forks / grown, method.tree_steps)


def root(gap: Callable[[float], float], low: float, high: float, tolerance: float, tries: int = 10) -> float:
    """Find where a falling function is nearest to 0: false position, halving the weight of an end that stays."""
    ends, seen = [(low, gap(low)), (high, gap(high))], {low: gap(low), high: gap(high)}
    stayed = -1
    while min(map(abs, seen.values())) > tolerance and len(seen) < 2 + tries and ends[0][1] > 0 > ends[1][1]:
        (left, above), (right, below) = ends
        middle = left + (right - left) * above / (above - below)
        value = seen[middle] = gap(middle)
        moved = 0 if value > 0 else 1
        ends[moved] = (middle, value)
        if stayed == 1 - moved:  # it stayed twice
            ends[stayed] = (ends[stayed][0], ends[stayed][1] / 2)
        stayed = 1 - moved
    return min(seen, key=lambda at: abs(seen[at]))


def run(
    seed: int = 0,
    sets: Sequence[str] = ("chat", "writing", "summarise"),
    count: int = 4,
    group: int = 8,
    new_tokens: int = 128,
    ages: str = "20/30/50",
    tree_steps: int = 64,
    tolerance: float = 0.02,
) -> Outcome:
    """Measure how far apart rollouts are, against sampling at the temperature that gives the same mean log-probability.

    Parameters
    ----------
    seed : int
        Of sampling.
    sets : sequence of str
        Prompt sets.
    count : int
        Prompts of each set.
    group : int
        Rollouts a prompt.
    new_tokens : int
        Of each.
    ages : str
        Option of the method.
    tree_steps : int
        Tokens after which the trees are left: half of the text, as in the authors' runs.
    tolerance : float
        How near the mean log-probabilities are brought, in nats a token.
    """
    lm = load("smollm2")
    ids = lm.encode([prompt.prompt for name in sets for prompt in prompts(set=name)[:count]])
    tree: dict[str, Any] = {"group": group, "ages": ages, "tree_steps": tree_steps}

    def arm(temperature: float = 1.0, **options: Any) -> Rollouts:
        return write(lm, ids, LATR(**{**tree, **options}), new_tokens, temperature, seed)

    latr, hot = arm(), arm(eta=0.0)
    greedy = arm(0.0, group=1, eta=0.0)
    trials = {0.0: greedy, 1.0: hot}

    def gap(temperature: float) -> float:
        if temperature not in trials:
            trials[temperature] = arm(temperature, eta=0.0)
        return trials[temperature].log_prob - latr.log_prob

    at = root(gap, 0.0, 1.0, tolerance)
    sampled = trials[at]
    random = arm(random_forks=max(latr.fork_rate, 1e-3))
    found = {
        "latr": latr,
        "matched sampling": sampled,
        "sampling at 1": hot,
        "random forks": random,
        "latr without pruning": arm(tau_ed=0.0),
    }
    spreads = {name: rollouts.spread() for name, rollouts in found.items()}

    def figure(of: str, name: str) -> Figure:
        return Figure.of(name, spreads[of])

    return Outcome(
        method=figure("latr", "latr"),
        baseline=figure("matched sampling", "sampling at the same log-probability"),
        # Greedy rollouts are one text: their distance is 0, whatever the text.
        controls=(Figure("none", 0.0), figure("random forks", "random"), figure("sampling at 1", "sampling at 1")),
        n=len(ids),
        paired_spread=standard_error(spreads["latr"] - spreads["matched sampling"]),
        details={
            "matched_temperature": at,
            "log_prob_gap": sampled.log_prob - latr.log_prob,
            "greedy_log_prob": greedy.log_prob,
            "arms": {name: rollouts.summary() for name, rollouts in found.items()},
        },
    )


CLAIM = Claim(
    slug="latr",
    statement="The 8 rollouts of a prompt lie at least 5% further apart than samples drawn at the temperature that "
    "gives the same mean log-probability",
    metric="mean pairwise edit distance of the rollouts of a prompt, over the longer length",
    direction="higher",
    threshold=1.05,
    run=run,
    variation="other prompts (code, French, German), branches compared at 10 and 20 tokens",
    held_out={"sets": ("code", "french", "german"), "ages": "10/20"},
    minutes=20,
    fast={
        "sets": ("chat",),
        "count": 2,
        "group": 4,
        "new_tokens": 32,
        "ages": "4/8",
        "tree_steps": 16,
        "tolerance": 0.5,
    },
)
