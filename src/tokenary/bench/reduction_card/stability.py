"""Stability of training with a reducer in the model: the same scenes in the same order, a ladder of learning rates.

Tiny models are trained from scratch on everything, with the reducer, and with random tokens of the same number, which
regularise too: what random dropping does as well is not the reducer's doing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenary.bench.reduction_card.arms import Entry
from tokenary.bench.reduction_card.watching import Watched
from tokenary.core.errors import TokenaryError
from tokenary.models.bench_vlm.batches import Batch, collate
from tokenary.models.bench_vlm.model import BenchVLM, sized
from tokenary.models.bench_vlm.scenes import Geometry, render
from tokenary.models.bench_vlm.training import answer_loss, schedule
from tokenary.probe.token_reduction_position.effects import figures, over_seeds
from tokenary.probe.token_reduction_position.stability import (
    dead_share,
    diverged,
    effective_rank,
    largest_stable,
    sink_share,
    spikes,
    variation,
)
from tokenary.reduce.base import Reducer
from tokenary.reduce.reduce_random import ReduceRandom

SIZE = "tiny"
RATES = (1e-3, 1e-2, 1e-1, 3e-1, 1.0)
SEEDS, STEPS, BATCH = 5, 60, 32
FAMILIES = ("attribute", "existence", "counting")
WARMUP = 0.1


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes
    ----------
    losses, norms : list of float
        By step; norms of gradients before they are clipped.
    rank : float
        Effective rank of the image tokens' states behind the last layer, on scenes that were not trained on.
    logit : float
        Largest attention logit there.
    sinks, dead : float
        Share of attention on sinks, and of keys that get nearly none.
    """

    losses: list[float]
    norms: list[float]
    rank: float
    logit: float
    sinks: float
    dead: float

    def figures(self) -> dict[str, float]:
        """Return the run as plain numbers; nan where it is not defined."""
        return {
            "final_loss": statistics.fmean(self.losses[-5:]),
            "spikes": float(spikes(self.losses)),
            "norm_variation": variation(self.norms),
            "effective_rank": self.rank,
            "largest_logit": self.logit,
            "sink_share": self.sinks,
            "dead_share": self.dead,
        }


def batches(geometry: Geometry, seed: int, steps: int, batch: int) -> list[Batch]:
    """Draw the scenes of a seed, the same for every arm and rate; the last batch is held out."""
    return [
        collate([render(geometry, "train", seed, step * batch + i, FAMILIES) for i in range(batch)], 32)
        for step in range(steps + 1)
    ]


def train(drawn: Sequence[Batch], reducer: Reducer | None, at: str, rate: float, seed: int, size: str = SIZE) -> Run:
    """Train a model from scratch with a reducer in it; weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BenchVLM(sized(size))
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    losses, norms = [], []
    with Watched(model, reducer, at) as watched:
        for step, batch in enumerate(drawn[:-1]):
            optimizer.param_groups[0]["lr"] = rate * schedule(step / (len(drawn) - 1), WARMUP)
            loss = answer_loss(watched(watched.image_tokens(batch.pixels), batch.ids), batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(parameters, 1.0)))
            optimizer.step()
            losses.append(float(loss.detach()))
        model.eval()
        return Run(losses, norms, *_look(watched, drawn[-1]))


@torch.no_grad()
def _look(watched: Watched, batch: Batch) -> tuple[float, float, float, float]:
    """Effective rank, largest logit, sinks and dead keys on held-out scenes."""
    rows = batch.predicted.int().argmax(1) - 1
    width = batch.ids.shape[1]
    with watched.watching(rows, width, leaving=True) as notes:
        watched(watched.image_tokens(batch.pixels), batch.ids)
    states = notes.leaving[-1][:, 1:-width].flatten(0, 1)
    read = torch.stack([_in_front(layer, rows, width) for layer in notes.attention])
    return effective_rank(states), notes.logit, sink_share(read), dead_share(read)


def _in_front(attention: Tensor, rows: Tensor, width: int) -> Tensor:
    """Attention that keys get on average, of those that every watched row sees: all up to the shortest question."""
    return attention[:, : attention.shape[1] - width + int(rows.min()) + 1].mean(0)[: 1 + attention.shape[1] - width]


def ladder(
    chosen: Sequence[Entry],
    *,
    rates: Sequence[float] = RATES,
    seeds: int = SEEDS,
    steps: int = STEPS,
    batch: int = BATCH,
    size: str = SIZE,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train every arm at every rate and seed; return settings, ``arms`` with figures by rate, and what was left out.

    Parameters
    ----------
    chosen : sequence of Entry
        Reducers, each with random tokens of the same budget at the same place.
    rates : sequence of float
        Peak learning rates.
    seeds, steps, batch : int
        Of a run.
    size : str
        Of the model.
    say : callable
        Told what is under way.
    """
    geometry = sized(size).geometry
    drawn = {seed: batches(geometry, seed, steps, batch) for seed in range(seeds)}
    plain = _arm(drawn, lambda seed: None, "encoder", rates, size)
    rows, left_out = [_row("none", "encoder", plain, None)], []
    for entry in chosen:
        say(f"stability: {entry.name}")
        keep = entry.reducer.keep
        try:
            runs = _arm(drawn, lambda seed, one=entry: one.reducer, entry.at, rates, size)  # type: ignore[misc]
        except TokenaryError as error:
            left_out.append(f"{entry.name}: {error}")
            continue
        random = _arm(drawn, lambda seed, keep=keep: ReduceRandom(keep, seed), entry.at, rates, size)  # type: ignore[misc]
        rows.append(_row(entry.name, entry.at, runs, random))
        rows.append(_row("random", entry.at, random, None) | {"beside": entry.name})
    settings = {"size": size, "seeds": seeds, "steps": steps, "batch": batch, "rates": list(rates)}
    return {"settings": settings, "arms": rows, "left_out": left_out}


Ladder = dict[float, list[Run]]


def _arm(
    drawn: dict[int, list[Batch]], make: Callable[[int], Reducer | None], at: str, rates: Sequence[float], size: str
) -> Ladder:
    return {
        rate: [train(each, make(seed), at, rate, seed, size) for seed, each in drawn.items()] for rate in sorted(rates)
    }


def _row(name: str, at: str, runs: Ladder, random: Ladder | None) -> dict[str, Any]:
    """Return an arm's figures by rate, and its paired differences to random tokens."""
    by_rate, over = {}, {}
    for rate, same in runs.items():
        table = [run.figures() for run in same]
        column = {key: [row[key] for row in table] for key in table[0]}
        by_rate[f"{rate:g}"] = {
            "diverged": sum(diverged(run.losses) for run in same),
            "seed_spread": float(np.std(column["final_loss"], ddof=1)) if len(same) > 1 else None,
            **{key: statistics.fmean(values) for key, values in column.items()},
        }
        if random is not None:
            other = [run.figures() for run in random[rate]]
            over[f"{rate:g}"] = figures(
                {key: over_seeds([a[key] - b[key] for a, b in zip(table, other, strict=True)]) for key in column}
            )
    stable = largest_stable({rate: [run.losses for run in same] for rate, same in runs.items()})
    return {"name": name, "at": at, "largest_stable_rate": stable, "by_rate": by_rate, "over_random": over or None}
