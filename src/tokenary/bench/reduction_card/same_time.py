"""Time on a card: reducers and plain controls in turns, and what the controls reach in a reducer's time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from tokenary.bench.reduction import Times, measure_times, per_question, run_arm
from tokenary.bench.reduction_card.arms import Arms, Entry
from tokenary.bench.reduction_card.figures import Retention
from tokenary.bench.same_time import CONTROLS, over_controls
from tokenary.core.budget import Budget
from tokenary.core.statistics import Array
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.models.bench_vlm.vocabulary import VOCABULARY
from tokenary.reduce.base import Reducer
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom

SHARES, ROUNDS, REPEATS = (0.5, 0.25, 0.125, 0.0625), 3, 3
Placed = tuple[Reducer | None, str]


class SameTime:
    """Plain controls behind the encoder, at several budgets: asked once a card, and timed anew beside every reducer.

    Parameters
    ----------
    arms : Arms
    retention : Retention
    """

    def __init__(self, arms: Arms, retention: Retention) -> None:
        self.arms, self.retention = arms, retention
        self.rights: dict[str, dict[str, Array]] = {}  # by control and budget; that of the whole model is empty
        self.placed: dict[str, Placed] = {"none": (None, "encoder")}
        whole = per_question(retention.rights([arms.full]))
        for control in CONTROLS:
            self.rights[control] = {"none": whole}
            for share in SHARES:
                name, budget = f"{control}:keep={100 * share:g}%", Budget(ratio=share)
                drawn = [ReduceRandom(budget, seed) for seed in arms.seeds]
                reducers = drawn if control == "reduce-random" else [ReducePool(budget)]
                self.placed[name] = (reducers[0], "encoder")
                found = run_arm(arms.model, name, reducers, arms.asked.families, at="encoder")
                self.rights[control][name] = per_question(found.right)

    def of(self, entry: Entry) -> dict[str, Any]:
        """Return the seconds of a reducer and of the whole model, and retention over each control in the same time."""
        batch = self.arms.asked.families.batch
        ids = torch.tensor([VOCABULARY.prompt("how many objects are there?")])
        timed = in_turns(self.arms.model, {**self.placed, "reducer": (entry.reducer, entry.at)}, batch.pixels[:1], ids)
        seconds = {name: each.encode + each.prefill for name, each in timed.items()}
        curves = {
            control: ([seconds[name] for name in points], list(points.values()))
            for control, points in self.rights.items()
        }

        def over(other: Array) -> dict[str, Any]:
            return self.retention(self.arms.of(entry), self.retention.counted, minus=other).to_json()

        return {
            "seconds": {name: vars(timed[name]) for name in ("reducer", "none")},
            "same_time": over_controls(seconds["reducer"], curves, over),
        }


def in_turns(
    model: BenchVLM, placed: Mapping[str, Placed], pixels: torch.Tensor, ids: torch.Tensor
) -> dict[str, Times]:
    """Time reducers one after the other, several rounds, so that a busy moment slows all of them: medians."""
    rounds: dict[str, list[Times]] = {name: [] for name in placed}
    for _ in range(ROUNDS):
        for name, (reducer, at) in placed.items():
            rounds[name].append(measure_times(model, reducer, pixels, ids, at=at, repeats=REPEATS))
    return {
        name: Times(*(statistics.median(getattr(each, key) for each in found) for key in ("encode", "prefill", "plan")))
        for name, found in rounds.items()
    }
