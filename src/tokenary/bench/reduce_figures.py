"""What a comparison of reducers found on one kind of pictures, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tokenary.bench.quality import PLAIN
from tokenary.bench.reduce_arms import BLIND, Answers, Contender, Cost, contenders_of, draw, fitting, sample
from tokenary.bench.reduction import per_question, retained
from tokenary.bench.same_time import CONTROLS, over_controls
from tokenary.core.recipe import Recipe
from tokenary.core.statistics import Array
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.models.bench_vlm.scenes import FAMILIES
from tokenary.models.bench_vlm.training import judge

RESAMPLES = 1000
VIEWS = {"pictures": 1, "crops": 5}
#: Questions of each family in a batch: one of crops has as many views as five pictures.
BATCH = {"pictures": 8, "crops": 2}


@dataclass
class Part:
    """One kind of pictures, and what was measured on it."""

    name: str
    contenders: dict[str, list[Contender]]  # by model; they differ in what was trained for it
    examples: list[tuple[Tensor, Tensor]]
    costs: dict[str, Cost] = field(default_factory=dict)
    batches: list[dict[tuple[str, str], Answers]] = field(default_factory=list)  # by model and recipe

    @classmethod
    def of(
        cls, name: str, nets: Mapping[str, BenchVLM], recipes: Sequence[Recipe], budgets: Sequence[float],
        room: str | None, draws: int, seed: int, timed: int, trained: Mapping[str, Mapping[str, Mapping[str, str]]],
    ) -> tuple[Part, list[str]]:  # fmt: skip
        """Say who is compared on it, and who is not."""
        contenders, left_out = dict[str, list[Contender]](), list[str]()
        first, net = next(iter(nets.items()))
        for model in nets:
            contenders[model], left_out = contenders_of(
                recipes, budgets, room, net.config, views=VIEWS[name], draws=draws, seed=seed, trained=trained[model]
            )
        examples = sample(draw(net.config, [0], seed, name == "crops"))[:timed]
        contenders[first], unfit = fitting(net, contenders[first], examples)
        stay = {each.recipe for each in contenders[first]}
        fit = {model: [each for each in some if each.recipe in stay] for model, some in contenders.items()}
        return cls(name, fit, examples), [*left_out, *(f"{name}: {line}" for line in unfit)]

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self.contenders)

    @property
    def compared(self) -> list[Contender]:
        """The contenders, of the first model."""
        return next(iter(self.contenders.values()))

    @property
    def asked(self) -> int:
        """Questions of each family that everybody answered."""
        return sum(next(iter(batch.values())).right.shape[1] for batch in self.batches) // len(FAMILIES)

    def steps(self, prompts: int) -> int:
        """Units of work of all that is measured."""
        return len(self.compared) * (len(self.examples) + -(-prompts // BATCH[self.name]) * len(self.models))

    def joined(self, recipe: str, model: str | None = None) -> Answers:
        """Answers to all questions, seeds and models one below the other: (models seeds, n)."""
        models = [each for each in self.models if model in (None, each)]
        found = [
            [np.concatenate([getattr(batch[each, recipe], name) for batch in self.batches], axis=1) for each in models]
            for name in ("right", "kept", "tokens")
        ]
        return Answers(*map(np.concatenate, found))


def part_of(part: Part, net: BenchVLM, gates: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one kind of pictures."""
    names = list(FAMILIES) * part.asked
    families = _families(part, names, gates)
    figures = _Figures(part, names, [name for name, family in families.items() if family["fit"]])
    points = [figures.point(contender) for contender in part.compared]
    side = net.config.side * (2 if part.name == "crops" else 1)
    about = {"name": part.name, "side": side, "views": VIEWS[part.name], "questions": part.asked}
    return {**about, "families": families, "points": points}


def _families(part: Part, names: Sequence[str], gates: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Say of each family what is answered with and without pictures, and whether it is fit to measure on.

    That is what was found when the model's training ended, of each model. Where it has not, and of crops, it is judged
    by these questions.
    """
    measured = {
        model: [_by_family(part.joined(recipe, model).right, names) for recipe in (PLAIN, BLIND)]
        for model in part.models
    }
    verdicts = {
        model: gates[model] if part.name == "pictures" and gates[model] else judge(*measured[model])
        for model in part.models
    }
    full, blind = (_by_family(part.joined(recipe).right, names) for recipe in (PLAIN, BLIND))
    return {
        family: {
            "full": full[family],
            "blind": blind[family],
            "needed": max(verdict[family]["needed"] for verdict in verdicts.values()),
            "fit": all(verdict[family]["passed"] for verdict in verdicts.values()),
        }
        for family in FAMILIES
    }


def _by_family(right: Any, names: Sequence[str]) -> dict[str, float]:
    rates = per_question(right)
    return {family: round(float(rates[[name == family for name in names]].mean()), 4) for family in FAMILIES}


class _Figures:
    """Points of one kind of pictures."""

    def __init__(self, part: Part, names: Sequence[str], fit: Sequence[str]) -> None:
        self.part, self.names, self.fit = part, names, fit
        self.whole, self.cost = part.joined(PLAIN), part.costs[PLAIN]
        self.controls: dict[float, str] = {}  # the best one at each budget
        for contender in part.compared:
            if contender.control and contender.budget is not None:
                best = self.controls.setdefault(contender.budget, contender.recipe)
                if (self._gain(contender.recipe) or 0) > (self._gain(best) or 0):
                    self.controls[contender.budget] = contender.recipe

    def point(self, contender: Contender) -> dict[str, Any]:
        """Everything that is known of one contender."""
        said, cost, whole = self.part.joined(contender.recipe), self.part.costs[contender.recipe], self.cost
        seconds, all_seconds = cost.times.encode + cost.times.prefill, whole.times.encode + whole.times.prefill
        return {
            "curve": contender.curve,
            "recipe": contender.recipe,
            "control": contender.control,
            "budget": contender.budget,
            "at": contender.at,
            "seeds": len(contender.reducers),
            "kept": round(float(said.kept.mean()), 2),
            "tokens": round(float(said.tokens.mean()), 2),
            "share": float(said.tokens.mean() / self.whole.tokens.mean()),
            "flops": round(cost.flops),
            "flops_share": cost.flops / whole.flops,
            "kv_bytes": round(cost.kv_bytes),
            "kv_share": cost.kv_bytes / whole.kv_bytes,
            "encode_ms": 1e3 * cost.times.encode,
            "prefill_ms": 1e3 * cost.times.prefill,
            "overhead_ms": 1e3 * cost.times.plan,
            "time_share": seconds / all_seconds,
            "accuracy": round(float(said.right.mean()), 4),
            "retention": self._retained(contender.recipe, self.fit),
            "models": {model: self._gain(contender.recipe, model) for model in self.part.models},
            "over": self._over(contender),
            "same_time": self._same_time(contender),
            "families": self._by_family(contender.recipe, said),
        }

    def _by_family(self, recipe: str, said: Answers) -> dict[str, dict[str, Any]]:
        accuracy = _by_family(said.right, self.names)
        return {family: {"accuracy": accuracy[family], **self._retained(recipe, [family])} for family in FAMILIES}

    def _over(self, contender: Contender) -> dict[str, Any] | None:
        """The difference to the best control at the same budget."""
        control = None if contender.budget is None or contender.control else self.controls.get(contender.budget)
        if control is None:
            return None
        other = per_question(self.part.joined(control).right)
        return {"control": control, **self._retained(contender.recipe, self.fit, minus=other)}

    def _same_time(self, contender: Contender) -> dict[str, Any] | None:
        """The differences to what plain controls reach in the same time."""
        if contender.control:
            return None
        seconds = {name: cost.times.encode + cost.times.prefill for name, cost in self.part.costs.items()}
        curves = {}
        for control in CONTROLS:
            names = [each.recipe for each in self.part.compared if each.curve in (control, PLAIN)]
            rights = [per_question(self.part.joined(name).right) for name in names]
            curves[control] = [seconds[name] for name in names], rights
        recipe = contender.recipe
        return over_controls(seconds[recipe], curves, lambda other: self._retained(recipe, self.fit, minus=other))

    def _gain(self, recipe: str, model: str | None = None) -> float | None:
        """Retention over families that are fit, without an interval."""
        return self._retained(recipe, self.fit, model, resamples=1)["value"]

    def _retained(
        self,
        recipe: str,
        families: Sequence[str],
        model: str | None = None,
        minus: Array | None = None,
        resamples: int = RESAMPLES,
    ) -> dict[str, float | None]:
        """Retention over some families, of all models together or of one; or its difference to that of answers (n,)."""
        here = np.array([name in families for name in self.names])
        if not here.any():
            return {"value": None, "low": None, "high": None}
        names = [name for name in self.names if name in families]
        own, full, blind = (per_question(self.part.joined(arm, model).right)[here] for arm in (recipe, PLAIN, BLIND))
        other = None if minus is None else minus[here]
        return retained(own, full, blind, names, minus=other, resamples=resamples).to_json()
