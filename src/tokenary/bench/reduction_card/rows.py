"""The rows of a report card: one an arm, as plain JSON types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenary.bench.reduction_card.arms import Arms, Entry, Runs
from tokenary.bench.reduction_card.asking import answers_of, flipped
from tokenary.bench.reduction_card.figures import Retention, alignment, compared
from tokenary.bench.reduction_card.invariants import invariants
from tokenary.bench.reduction_card.same_time import SameTime
from tokenary.core.statistics import spearman
from tokenary.probe.token_reduction_position.effects import Parts, effect, figures

#: What of a map may explain what it does, over the reducers of a card.
TRAITS = ("coverage", "evidence", "locality", "redundancy")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Card:
    """What rows are made from."""

    arms: Arms
    retention: Retention
    captions: list[torch.Tensor]
    some: Mapping[str, Any]

    def rows(self, chosen: Sequence[Entry], say: Say) -> Iterator[dict[str, Any]]:
        """Ask one arm after the other, and give a row of each."""
        first = self.arms.random(chosen[0]) if chosen else None
        say("plain controls over time")
        time = SameTime(self.arms, self.retention)
        yield self.row("none", "none", "", "", [self.arms.full], first)
        yield self.row("blind", "blind", "", "0", [self.arms.blind], first)
        done = set()
        for entry in chosen:
            say(entry.name)
            random = self.arms.random(entry)
            row = self.row(entry.name, "reducer", entry.at, str(entry.reducer.keep), self.arms.of(entry), random)
            yield row | self._alone(entry) | time.of(entry)
            for name, at, runs in self.arms.controls(entry):
                if id(runs) in done:  # the same control stands beside several reducers
                    continue
                done.add(id(runs))
                other = None if name == "random" else random
                yield self.row(name, "control", at, str(entry.reducer.keep), runs, other) | {"beside": entry.name}

    def row(self, name: str, role: str, at: str, keep: str, runs: Runs, random: Runs | None) -> dict[str, Any]:
        """Return the figures of one arm."""
        found, over = compared(runs, random, self.arms.asked, self.arms.blind, self.some)
        families = self.retention.families
        right = torch.tensor(sum(run.right[: len(families)] for run in runs) / len(runs))
        accuracy = {
            family: round(float(right[[each == family for each in families]].mean()), 4)
            for family in dict.fromkeys(families)
        }
        aligned = alignment(runs, random, self.captions, self.some) if runs[0].states else None
        if over is not None and aligned is not None and random is not None:
            over = over | aligned["over_random"]
        return {
            "name": name, "role": role, "at": at, "keep": keep, "seeds": len(runs),
            "cost": {
                "kept": _mean(run.kept for run in runs), "layer_tokens": _mean(run.layer_tokens for run in runs),
                "gflops": _mean(run.flops / 1e9 for run in runs), "kv_bytes": _mean(run.kv_bytes for run in runs),
            },
            "accuracy": accuracy,
            "retention": self.retention.row(runs),
            "retention_over_random": None if random is None else self.retention.row(runs, random),
            "figures": found | (aligned["figures"] if aligned else {}),
            "over_random": over,
            "by_layer": aligned["by_layer"] if aligned else None,
        }  # fmt: skip

    def _alone(self, entry: Entry) -> dict[str, Any]:
        """Return what is measured of the reducer itself: positions, and what must hold."""
        arms, families = self.arms, len(self.retention.families)
        own, other = arms.of(entry)[0], answers_of(arms.model, flipped(entry.reducer), arms.asked, entry.at)
        first, second = (own, other) if entry.reducer.positions == "original" else (other, own)
        moved = effect(Parts.mean(first.right[:families]), Parts.mean(second.right[:families]), **self.some)
        return {
            "positions": figures({"original_over_compact": moved}),
            "invariants": invariants(arms.model, entry.reducer, entry.at, arms.asked.families),
        }


def _mean(values: Any) -> float:
    listed = list(values)
    return round(sum(listed) / len(listed), 4)


def explained(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rank correlations, over the arms that see something, of traits of their maps with what they retain."""
    seen = [
        row for row in rows if row["role"] in ("reducer", "control") and row["retention"]["mean"]["value"] is not None
    ]
    found = {}
    for target in ("retention", "adversarial: false_yes"):
        values = [row["retention"]["mean"] if target == "retention" else row["figures"][target] for row in seen]
        for trait in TRAITS:
            pairs = [(row["figures"][trait]["value"], value["value"]) for row, value in zip(seen, values, strict=True)]
            whole = [pair for pair in pairs if None not in pair]
            rho = spearman(*zip(*whole, strict=True)) if len(whole) > 2 else None
            found[f"{trait} with {target}"] = None if rho is None else round(rho, 3)
    return {"arms": len(seen), "spearman": found}
