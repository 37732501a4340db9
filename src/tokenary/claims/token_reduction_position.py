"""Token reduction beyond efficiency: whether a reducer makes a model say yes to fewer things that are not there.

The paper argues that fewer tokens curb hallucination. Any reducer lowers the share of yes somewhat, as less is seen; so
the comparison is with random tokens, at the same recall of 0.9: at the lower recall that random tokens have by
themselves there are next to no false yes to lower. The details say it there too, and against all tokens. The reducer is
chosen on pictures that are not measured. Two more signs, written down beforehand, stand in the details: that every
reducer costs reading more than existence, and that average pooling is within two points of the best in existence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from tokenary.bench.reduction import retained, run_arm
from tokenary.bench.reduction_card.asking import NO, YES
from tokenary.bench.reduction_card.questions import existence_questions, trimmed
from tokenary.claims.bipartite import BipartiteMerging
from tokenary.claims.scene_reading import about
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Figure, Outcome
from tokenary.core.statistics import Interval, spearman
from tokenary.models.bench_vlm import load, questions
from tokenary.models.bench_vlm.batches import EVALUATION_SEED, Questions
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.probe.token_reduction_position.hallucination import false_yes_at, false_yes_at_equal_recall
from tokenary.reduce.base import Reducer
from tokenary.reduce.entropy_prune import EntropyPrune
from tokenary.reduce.hiprune import HiPrune
from tokenary.reduce.idpruner import IDPruner
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_low_res import ReduceLowRes
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom
from tokenary.reduce.vlm import ReducedVLM

RECALL = 0.9  # below the 0.95 that the gate of existence asks of the model
CHOSEN_ON, MEASURED_ON = 350, 450  # added to the seed of the pictures
NEAR = 0.02  # of accuracy in existence


def reducers(keep: float) -> dict[str, tuple[Reducer, str]]:
    """Return the reducers at one share kept, averaged over the layers of the language model, and where each acts."""
    budget = Budget(ratio=keep)
    found: list[tuple[str, Reducer, str]] = [
        ("grid", ReduceGrid(budget), "encoder"),
        ("low-res", ReduceLowRes(budget), "encoder"),
        ("pooling", ReducePool(budget), "encoder"),
        ("bipartite merging", BipartiteMerging(budget), BipartiteMerging.at),
        ("hiprune", HiPrune(budget), "encoder"),
        ("idpruner", IDPruner(budget), "encoder"),
        # in front of the second layer: of six layers two that see everything would be above the budget by themselves
        ("entropy-prune", EntropyPrune(budget), "decoder:1"),
    ]
    return {name: (reducer, at) for name, reducer, at in found}


@torch.inference_mode()
def log_odds(model: BenchVLM, reducer: Reducer | None, at: str, asked: Questions, blind: bool = False) -> np.ndarray:
    """Return the log-odds of yes over no, (n,)."""
    found, data = [], asked.batch
    with ReducedVLM(model, reducer, at) as reduced:
        for start in range(0, len(data.ids), 64):
            rows = slice(start, start + 64)
            ids, predicted = trimmed(asked, rows)
            last = predicted.int().argmax(1) - 1
            seen = None if blind else reduced.image_tokens(data.pixels[rows])
            logits = reduced(seen, ids)[torch.arange(len(ids)), last]
            found.append((logits[:, YES] - logits[:, NO]).double().numpy())
    return np.concatenate(found)


@dataclass(frozen=True)
class FalseYes:
    """Log-odds of every arm on one set of questions, and what follows from them.

    Parameters
    ----------
    odds : mapping of str to array
        By arm; random (seeds, n), the others (n,).
    positive : (n,) bool array
    seed : int
        Of the bootstrap.
    """

    odds: Mapping[str, np.ndarray]
    positive: np.ndarray
    seed: int

    @classmethod
    def measured(cls, model: BenchVLM, asked: Questions, keep: float, random_seeds: int, seed: int) -> FalseYes:
        """Ask every arm."""
        odds = {name: log_odds(model, reducer, at, asked) for name, (reducer, at) in reducers(keep).items()}
        odds["none"] = log_odds(model, None, "encoder", asked)
        odds["blind"] = log_odds(model, None, "encoder", asked, blind=True)
        drawn = [ReduceRandom(Budget(ratio=keep), seed + i) for i in range(random_seeds)]
        odds["random"] = np.stack([log_odds(model, each, "encoder", asked) for each in drawn])
        return cls(odds, np.array([turn.kind == "positive" for turn in asked.turns]), seed)

    def rate(self, arm: str) -> float:
        """Share of yes among the negatives, as it is answered."""
        return float((np.atleast_2d(self.odds[arm]) > 0)[:, ~self.positive].mean())

    def recall(self, arm: str) -> float:
        """Share of yes among the positives."""
        return float((np.atleast_2d(self.odds[arm]) > 0)[:, self.positive].mean())

    def effect(self, arm: str, control: str = "random", recall: float | None = RECALL) -> Interval:
        """Return the difference of false yes to another arm, at one recall; None for that of the other arm."""
        odds, other = self.odds[arm], self.odds[control]
        return false_yes_at_equal_recall(odds, other, self.positive, recall=recall, seed=self.seed)

    def figure(self, arm: str, name: str = "") -> Figure:
        """Return an arm's false yes at the recall of the claim."""
        rate = false_yes_at(self.odds[arm], self.positive, RECALL)
        return Figure(name or arm, rate, math.sqrt(rate * (1 - rate) / int((~self.positive).sum())))

    def table(self) -> dict[str, Any]:
        """Return every arm as plain JSON types."""
        return {
            arm: {
                "recall": round(self.recall(arm), 4),
                "false_yes": round(self.rate(arm), 4),
                "false_yes_at_recall": round(false_yes_at(self.odds[arm], self.positive, RECALL), 4),
                "over_random": self.effect(arm).to_json(),
                "over_random_at_its_recall": self.effect(arm, recall=None).to_json(),
                "over_all_tokens": self.effect(arm, "none").to_json(),
                "over_all_tokens_at_their_recall": self.effect(arm, "none", None).to_json(),
            }
            for arm in self.odds
        }


def retentions(model: BenchVLM, keep: float, per_family: int, seed: int, anyres: bool) -> dict[str, Any]:
    """Return what reducers retain of reading and of existence, and the accuracy in existence."""
    asked = questions(
        model.config.geometry, "test", per_family, ("ocr", "existence"), EVALUATION_SEED + 100 * seed, anyres
    )
    full, blind = run_arm(model, "none", [None], asked), run_arm(model, "blind", [None], asked, blind=True)
    families = np.array([turn.family for turn in asked.turns])
    found: dict[str, Any] = {}
    for name, (reducer, at) in reducers(keep).items():
        arm = run_arm(model, name, [reducer], asked, at=at)
        kept = {
            family: retained(arm.right[:, here], full.right[:, here], blind.right[:, here], seed=seed)
            for family in ("ocr", "existence")
            if (here := families == family).any()
        }
        found[name] = {
            "ocr": kept["ocr"].to_json(),
            "existence": kept["existence"].to_json(),
            "existence_less_ocr": round(kept["existence"].value - kept["ocr"].value, 4),
            "existence_less_ocr_error": round(math.hypot(*(each.error for each in kept.values())), 4),
            "existence_accuracy": round(float(arm.right[:, families == "existence"].mean()), 4),
        }
    means = {family: [round(float(arm.right[:, families == family].mean()), 4) for arm in (full, blind)]
             for family in ("ocr", "existence")}  # fmt: skip
    return {"arms": found, "full_and_blind": means}


def signs(found: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Judge the signs that were written down beforehand; None where the model cannot read."""
    arms, (full, blind) = found["arms"], found["full_and_blind"]["ocr"]
    best = max(arm["existence_accuracy"] for arm in arms.values())
    kinds = ("over_random", "over_random_at_its_recall", "over_all_tokens", "over_all_tokens_at_their_recall")
    lower = {
        kind: [name for name in arms if (high := table[name][kind]["high"]) is not None and high < 0] for kind in kinds
    }
    falls = all(arm["existence_less_ocr"] > 2 * arm["existence_less_ocr_error"] for arm in arms.values())
    return {
        "every_reducer_costs_reading_more_than_existence": falls if full - blind >= 0.3 else None,
        "pooling_is_near_the_best_in_existence": arms["pooling"]["existence_accuracy"] >= best - NEAR,
        "no_reducer_lowers_false_yes_over_random": not lower["over_random"],
        "those_with_fewer_false_yes": lower,
    }


def correlations(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, float | None]:
    """Return rank correlations of what reducers retain in two settings."""

    def column(found: Mapping[str, Any], family: str) -> Sequence[float]:
        return [cast(float, arm[family]["value"] if arm[family]["value"] is not None else math.nan)
                for arm in found["arms"].values()]  # fmt: skip

    return {
        family: None if any(map(math.isnan, (*column(first, family), *column(second, family))))
        else spearman(column(first, family), column(second, family))
        for family in ("ocr", "existence")
    }  # fmt: skip


def run(
    seed: int = 0,
    adversarial: int = 400,
    per_family: int = 100,
    keep: float = 0.25,
    random_seeds: int = 5,
    anyres: bool = False,
    model: str = "xs-0",
) -> Outcome:
    """Ask for things that like to appear with what is there, and are not there.

    Parameters
    ----------
    seed : int
        Of the pictures, of random tokens and of the bootstrap.
    adversarial : int
        Negatives, and as many positives; the same number of other pictures for the choice of the reducer.
    per_family : int
        Questions of reading and of existence, for the details.
    keep : float
        Share of the image tokens that every reducer keeps.
    random_seeds : int
        Random choices that are averaged.
    anyres : bool
        Pictures of twice the side, seen as a thumbnail and four crops; then the details also say how ranks of the
        reducers compare with those on one view.
    model : str
        Name or folder of a bench VLM.
    """
    net = load(model).requires_grad_(False)
    geometry = net.config.geometry
    geometry = replace(geometry, side=2 * geometry.side) if anyres else geometry
    wanted = {"positive": adversarial, "adversarial": adversarial}
    start = EVALUATION_SEED + 1000 * seed
    others, asked = (existence_questions(geometry, wanted, start + part) for part in (CHOSEN_ON, MEASURED_ON))
    before = FalseYes.measured(net, others, keep, random_seeds, seed)
    found = FalseYes.measured(net, asked, keep, random_seeds, seed)
    chosen = min(reducers(keep), key=lambda name: before.effect(name).value)
    effect = found.effect(chosen)
    kept, table = retentions(net, keep, per_family, seed, anyres), found.table()
    details = {"model": about(model), "chosen": chosen, "arms": table, "retention": kept}
    if anyres:
        details["ranks_as_on_one_view"] = correlations(kept, retentions(net, keep, per_family, seed, False))
    return Outcome(
        method=found.figure(chosen),
        baseline=found.figure("random", "random tokens"),
        controls=(found.figure("none"), found.figure("blind"), found.figure("pooling"), found.figure("grid")),
        n=2 * adversarial,
        runs=random_seeds,
        paired_spread=effect.error,
        details={**details, "signs": signs(kept, table)},
    )


CLAIM = Claim(
    slug="token-reduction-position",
    statement="Of seven reducers at 25% of the image tokens, the one with the fewest adversarial false yes on other "
    "pictures has at least 0.05 fewer than random tokens, at the same recall of 0.9",
    metric="share of yes to adversarial negatives, at a recall of 0.9",
    direction="lower",
    threshold=0.05,
    effect="difference",
    run=run,
    variation="pictures of twice the side, seen as a thumbnail and four crops",
    held_out={"anyres": True, "adversarial": 150, "per_family": 50, "random_seeds": 3},
    model="bench-vlm-xs-0",
    minutes=8,
    fast={"adversarial": 24, "per_family": 8, "random_seeds": 1},
)
