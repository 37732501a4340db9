"""What the claims about reducing share that are measured on a bench VLM: its questions, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tokenary.bench.reduce_arms import Shown
from tokenary.bench.reduction import vlm_flops
from tokenary.claims.retention import KEEPS, Answers, Key
from tokenary.core.budget import Budget
from tokenary.core.errors import InputError
from tokenary.core.files import sha256_of
from tokenary.core.token_map import TokenMap
from tokenary.models.bench_vlm.batches import EVALUATION_SEED, Batch, Questions, questions
from tokenary.models.bench_vlm.loading import facts_of, folder_of, load
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.models.bench_vlm.scenes import FAMILIES
from tokenary.models.bench_vlm.training import MARGIN, exact_match
from tokenary.models.bench_vlm.vocabulary import PAD
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.reduce_low_res import ReduceLowRes
from tokenary.reduce.vlm import ReducedVLM

#: Reducers of an arm, one or one a seed, and where they act.
Arm = tuple[Sequence[Reducer | None], str]


def opened(name: str, families: Sequence[str] = (), among: Sequence[str] = FAMILIES) -> tuple[BenchVLM, list[str]]:
    """Load a model, with the families of questions that it is fit to be asked.

    Parameters
    ----------
    name : str
        That ships, or a folder.
    families : sequence of str
        Ask these, whatever the model's gates say; by default those whose gate it has passed.
    among : sequence of str
        No others than these.

    Raises
    ------
    InputError
        It has passed none of the gates: what a reducer retains of its answers means nothing.
    """
    gates = facts_of(name).get("gates", {}) if not families else {}
    fit = list(families) or [family for family in among if gates.get(family, {}).get("passed")]
    if not fit:
        raise InputError(f"{name} has passed the gate of none of: {', '.join(among)}")
    return load(name), fit


def about(name: str) -> dict[str, str]:
    """Name and hash of a model, for the record."""
    return {"name": Path(name).name, "sha256": sha256_of(folder_of(name) / "model.safetensors")}


def asked(
    model: BenchVLM, families: Sequence[str], count: int, seed: int, anyres: bool = False, calibrating: bool = False
) -> Questions:
    """Draw questions of a seed, `count` of each family, about test pictures; for calibration, validation pictures."""
    split, first = ("val" if calibrating else "test"), EVALUATION_SEED + 100 * (seed + 1)
    return questions(model.config.geometry, cast(Any, split), count, tuple(families), first, anyres)


def low_res(model: BenchVLM, keep: float, large: bool = False) -> Reducer:
    """Return the control that shrinks the picture to as many patches as a share of all tokens, or to one view."""
    patches = model.config.num_patches
    return ReduceLowRes(Budget(tokens=max(1, min(patches, int(keep * patches * (5 if large else 1))))))


class Everything(Reducer):
    """Is shown all that any reducer of these claims asks of an encoder, and keeps every token."""

    needs = frozenset({"queries", "keys", "pixels"})

    def layers(self, n_layers: int, layer: int) -> tuple[int, ...]:
        """Return all layers."""
        return tuple(range(n_layers))

    def plan(self, x: Tensor, keep: int, context: Context) -> TokenMap:
        """Keep all."""
        return TokenMap.identity(x.shape[1], x.device)


@dataclass
class Readings(Answers):
    """How questions were answered, by arm and share kept: each (seeds, n), 1 where an answer is right.

    Attributes
    ----------
    kept, flops : mapping of (str, float) to float
        Image tokens that the language model read in its upper layers, newlines included; multiplications and additions
        of a picture and its question. Means over pictures.
    left_out : mapping of str to (float, float)
        Families that are not counted, as the picture adds less than `MARGIN`: accuracy with and without it.
    """

    kept: dict[Key, float] = field(default_factory=dict)
    flops: dict[Key, float] = field(default_factory=dict)
    left_out: dict[str, tuple[float, float]] = field(default_factory=dict)

    def row(self, key: Key) -> dict[str, Any]:
        """Return the figures of an arm at one share kept."""
        costs = {"kept": round(self.kept[key], 2), "gflops": round(self.flops[key] / 1e9, 4)}
        return {**super().row(key), **costs, "families": self.by_family(key)}

    def by_family(self, key: Key) -> dict[str, float]:
        """Return what an arm retains of each family at one share kept; of all tokens, and of none, accuracies."""
        found = {}
        for family in dict.fromkeys(self.families or ()):
            here = np.array([each == family for each in self.families or ()])
            some, full, blind = (self.right[k][:, here].mean() for k in (key, ("none", 1.0), ("blind", 1.0)))
            found[family] = round(float(some if key[1] == 1.0 else (some - blind) / (full - blind)), 4)
        return found


@torch.no_grad()
def read(
    model: BenchVLM,
    held_out: Questions,
    arms: Mapping[Key, Arm],
    keeps: Sequence[float] = KEEPS,
    look: Callable[[Tensor, Context, slice], None] | None = None,
    valid: Tensor | None = None,
    batch: int = 32,
) -> Readings:
    """Answer questions with all tokens, without the picture, and with fewer tokens.

    Parameters
    ----------
    model : BenchVLM
        In its mode for inference.
    held_out : Questions
        What is asked.
    arms : mapping of (name, share kept) to reducers and their place
        One reducer, or one a seed.
    keeps : sequence of float
        Shares that figures are the mean over.
    look : callable, optional
        Called with the image tokens, the context and the numbers of every batch of pictures.
    valid : (n, N) bool Tensor, optional
        Which tokens of each picture are no padding.
    batch : int
        Pictures a pass.

    Raises
    ------
    InputError
        In none of the families the picture adds as much as `MARGIN`.
    """
    everything: dict[Key, Arm] = {("none", 1.0): ([None], "encoder"), ("blind", 1.0): ([None], "encoder"), **arms}
    right: dict[Key, list[list[bool]]] = {key: [[] for _ in reducers] for key, (reducers, _) in everything.items()}
    kept: dict[Key, list[float]] = {key: [] for key in everything}
    flops: dict[Key, list[float]] = {key: [] for key in everything}
    eyes = ReducedVLM(model, Everything(Budget(ratio=1.0)))
    for start in range(0, len(held_out.turns), batch):
        rows = slice(start, start + batch)
        part = some(held_out, rows)
        seen = eyes.image_tokens(part.batch.pixels)
        if valid is not None:
            seen = replace(seen, context=replace(seen.context, valid=valid[rows]))
        if look is not None:
            look(seen.tokens, seen.context, rows)
        for key, (reducers, at) in everything.items():
            for reducer, found in zip(reducers, right[key], strict=True):
                place = "encoder" if hasattr(reducer, "look") else at
                shown = ReducedVLM(model, reducer, place)
                net = shown if hasattr(reducer, "look") else Shown(shown, eyes, seen)
                found += exact_match(cast(BenchVLM, net), part, model.device, key[0] == "blind", batch)
                kept[key] += shown.kept
                cost = vlm_flops(model.config, shown.vision_tokens, shown.language_tokens, shown.views)
                flops[key] += [cost] * len(part.turns)
    return _fit(
        Readings(
            right={key: np.array(runs, dtype=np.float64) for key, runs in right.items()},
            keeps=keeps,
            families=[turn.family for turn in held_out.turns],
            kept={key: float(np.mean(each)) for key, each in kept.items()},
            flops={key: float(np.mean(each)) for key, each in flops.items()},
        )
    )


def some(held_out: Questions, rows: slice) -> Questions:
    """Return some of the questions, padded to the longest of them."""
    data = held_out.batch
    longest = int((data.ids[rows] != PAD).any(0).sum())
    part = Batch(data.pixels[rows], data.ids[rows, :longest], data.predicted[rows, :longest], data.classes[rows])
    return Questions(part, held_out.scenes[rows], held_out.turns[rows])


def _fit(readings: Readings) -> Readings:
    """Leave out the families in which the picture adds too little to be retained."""
    names, full, blind = readings.families or [], readings.right["none", 1.0][0], readings.right["blind", 1.0][0]
    here = {family: np.array([name == family for name in names]) for family in dict.fromkeys(names)}
    seen = {family: (float(full[rows].mean()), float(blind[rows].mean())) for family, rows in here.items()}
    poor = {family: pair for family, pair in seen.items() if pair[0] - pair[1] < MARGIN}
    if len(poor) == len(seen):
        raise InputError(f"in none of {', '.join(seen)} the picture adds {MARGIN:.0%} of right answers: {poor}")
    rows = np.array([name not in poor for name in names])
    right = {key: each[:, rows] for key, each in readings.right.items()}
    return replace(
        readings,
        right=right,
        families=[name for name in names if name not in poor],
        left_out={family: _rounded(pair) for family, pair in poor.items()},
    )


def _rounded(pair: tuple[float, float]) -> tuple[float, float]:
    return round(pair[0], 4), round(pair[1], 4)
