"""From answers to figures: what an arm is, and what it differs from random tokens by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.bench.reduction import retained
from tokenary.bench.reduction_card.asking import Answers
from tokenary.bench.reduction_card.questions import NEGATIVES, Asked
from tokenary.core.statistics import Array, Interval
from tokenary.probe.token_reduction_position.alignment import linear_cka, mutual_neighbours, retrieved
from tokenary.probe.token_reduction_position.coherence import distinct, longest_repeat
from tokenary.probe.token_reduction_position.effects import Parts, effect, estimate, figures, jackknife
from tokenary.probe.token_reduction_position.hallucination import (
    chair,
    divergence,
    existence,
    false_yes_at_equal_recall,
)

Runs = Sequence[Answers]
GROUPS, MARGIN = 20, 0.3


def kinds_of(asked: Asked) -> np.ndarray:
    """Kind of every existence question."""
    return np.array([turn.kind for turn in asked.existence.turns])


def parts_of(runs: Runs, asked: Asked, blind: Answers) -> dict[str, Parts]:
    """Return every figure of an arm that is a ratio of sums over questions, pictures or lists."""
    kinds, own = kinds_of(asked), slice(len(asked.families.turns), None)
    margin = np.stack([run.margin[own] for run in runs])
    found: dict[str, Parts] = {}
    for negative in NEGATIVES:
        among = (kinds == "positive") | (kinds == negative)
        rates = existence(margin > 0, kinds == "positive", among)
        found |= {f"{negative}: {name}": each for name, each in rates.items() if name != "recall"}
        found["recall"] = rates["recall"]
    found |= chair([run.counts for run in runs])
    prior = np.stack([divergence(run.first, blind.first).numpy() for run in runs])
    found["prior_divergence"] = Parts.mean(prior)
    found["wrong_image_agreement"] = Parts.mean(np.stack([run.swapped for run in runs]))
    found["distinct_2"] = Parts.mean([[distinct(text, 2) for text in run.texts] for run in runs])
    found["longest_repeat"] = Parts.mean([[float(longest_repeat(text)) for text in run.texts] for run in runs])
    for name in runs[0].maps:
        table = np.stack([run.maps[name] for run in runs])
        found[name] = Parts.mean(table, ~np.isnan(table[0]))
    return found


def gates(full: Answers, blind: Answers, families: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return accuracy with and without the picture by family, and whether seeing helps enough to speak of retention."""
    found = {}
    for family in dict.fromkeys(families):
        here = np.array([name == family for name in families])
        seen, unseen = float(full.right[: len(here)][here].mean()), float(blind.right[: len(here)][here].mean())
        found[family] = {"full": round(seen, 4), "blind": round(unseen, 4), "counts": seen - unseen >= MARGIN}
    return found


class Retention:
    """Retention of arms on the families whose gate is passed.

    Parameters
    ----------
    full, blind : Answers
    asked : Asked
    some : mapping
        ``resamples`` and ``seed``.
    """

    def __init__(self, full: Answers, blind: Answers, asked: Asked, some: Mapping[str, Any]) -> None:
        self.full, self.blind, self.some = full, blind, some
        self.families = [turn.family for turn in asked.families.turns]
        self.gates = gates(full, blind, self.families)

    def rights(self, runs: Runs) -> Array:
        """Return which questions of the families an arm answers right, (seeds, n)."""
        return np.stack([run.right[: len(self.families)] for run in runs])

    def __call__(self, runs: Runs, families: Sequence[str], minus: Array | None = None) -> Interval:
        """Return retention, the mean over some families, or its difference to that of right answers (n,)."""
        here = np.array([name in families for name in self.families])
        if not here.any():
            return Interval(float("nan"), float("nan"), float("nan"))
        own, full, blind = (self.rights(each)[:, here] for each in (runs, [self.full], [self.blind]))
        names = [name for name in self.families if name in families]
        found: Interval = retained(
            own, full, blind, names, minus=None if minus is None else minus[..., here], **self.some
        )
        return found

    @property
    def counted(self) -> list[str]:
        """Families that retention may be spoken of."""
        return [name for name, gate in self.gates.items() if gate["counts"]]

    def row(self, runs: Runs, minus: Runs | None = None) -> dict[str, Any]:
        """Return retention of each family that counts, and the mean, as plain JSON types."""
        other = None if minus is None else self.rights(minus)
        means = {"mean": self(runs, self.counted, other)}
        return figures(means | {family: self(runs, [family], other) for family in self.counted})


def compared(
    runs: Runs, control: Runs | None, asked: Asked, blind: Answers, some: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return an arm's figures, and their differences to random tokens, as plain JSON types."""
    parts = parts_of(runs, asked, blind)
    own = figures({name: estimate(each, **some) for name, each in parts.items()})
    if control is None:
        return own, None
    other = parts_of(control, asked, blind)
    effects = {name: effect(each, other[name], **some) for name, each in parts.items() if name in other}
    return own, figures(effects | equal_recall(runs, control, asked, some))


def equal_recall(runs: Runs, control: Runs, asked: Asked, some: Mapping[str, Any]) -> dict[str, Interval]:
    """Return differences of false yes at the recall of the control, by kind of negative."""
    kinds, own = kinds_of(asked), slice(len(asked.families.turns), None)
    method, other = (np.stack([run.margin[own] for run in each]) for each in (runs, control))
    return {
        f"{negative}: false_yes at equal recall": false_yes_at_equal_recall(
            method, other, kinds == "positive", (kinds == "positive") | (kinds == negative), **some
        )
        for negative in NEGATIVES
    }


# -- alignment --------------------------------------------------------------------------------------------------------


def alignment(runs: Runs, control: Runs | None, captions: Sequence[Tensor], some: Mapping[str, Any]) -> dict[str, Any]:
    """Return neighbours, CKA and retrieval of pictures and captions: mean over layers, by layer, and over random."""
    own = _aligned(runs, captions)
    found: dict[str, Any] = {
        "by_layer": {name: [round(float(v), 4) for v in layers.mean((0, 2))] for name, layers in own.items()},
        "figures": figures({name: estimate(Parts.mean(layers.mean(1)), **some) for name, layers in own.items()}),
        "over_random": None,
    }
    whole = _cka(runs, captions, slice(None))
    found["by_layer"]["linear_cka"] = [round(float(v), 4) for v in whole]
    groups = [np.arange(len(captions[0])) % GROUPS != group for group in range(GROUPS)]
    without = [float(_cka(runs, captions, group).mean()) for group in groups]
    found["figures"] |= figures({"linear_cka": jackknife(without, float(whole.mean()))})
    if control is None:
        return found
    other = _aligned(control, captions)
    effects = {n: effect(Parts.mean(v.mean(1)), Parts.mean(other[n].mean(1)), **some) for n, v in own.items()}
    less = [value - float(_cka(control, captions, group).mean()) for value, group in zip(without, groups, strict=True)]
    gap = float(whole.mean()) - float(_cka(control, captions, slice(None)).mean())
    found["over_random"] = figures({**effects, "linear_cka": jackknife(less, gap)})
    return found


def _aligned(runs: Runs, captions: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Figures a pair, (seeds, layers, pairs)."""
    found: dict[str, list[list[np.ndarray]]] = {"mutual_neighbours": [], "image_to_caption": [], "caption_to_image": []}
    for run in runs:
        pairs = list(zip(run.states, captions, strict=True))
        found["mutual_neighbours"].append([mutual_neighbours(x, y).numpy() for x, y in pairs])
        found["image_to_caption"].append([retrieved(x, y).numpy() for x, y in pairs])
        found["caption_to_image"].append([retrieved(y, x).numpy() for x, y in pairs])
    return {name: np.array(values) for name, values in found.items()}


def _cka(runs: Runs, captions: Sequence[Tensor], which: Any) -> np.ndarray:
    """Linear CKA by layer, mean over seeds, of some pairs."""
    index = torch.arange(len(captions[0]))[which]
    return np.mean([[linear_cka(x[index], y[index]) for x, y in zip(r.states, captions, strict=True)] for r in runs], 0)
