"""HiPrune: of the tokens of a formula, those of two layers together are worth more than those of either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenary.claims.formula_reading import KEEPS, Pages, Readings, error, pages, read, see
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Outcome
from tokenary.models.latex_ocr import LatexOcr, load
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.hiprune import HiPrune, dispersion, plateau_end, received
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom

PROBED = 99  # seed of the formulas that dispersion is taken of; none of them is measured
SHARES = (0.05, 0.1, 0.25)
RIVALS = ("deep layer alone", "object layer alone", "grid")


@torch.no_grad()
def curves(model: LatexOcr, shown: Pages, batch: int = 8) -> dict[float, Tensor]:
    """Return how far apart the tokens with the most attention lie, by layer, for several shares: (n_layers,) each."""
    found: dict[float, list[Tensor]] = {share: [] for share in SHARES}
    for pixels in shown.pixels.split(batch):
        memory, context = see(model, pixels)
        scores = [received(memory, layer, context) for layer in range(context.n_layers)]
        for share, column in found.items():
            column.append(torch.stack([dispersion(each, memory, share) for each in scores], dim=1))
    return {share: torch.cat(column).mean(0) for share, column in found.items()}


def rivals(keep: float, by_curve: int, random_seeds: int, seed: int) -> dict[tuple[str, float], list[Reducer]]:
    """Return the arms at one share kept."""
    some: dict[str, Any] = {"keep": Budget(ratio=keep)}
    arms: dict[str, list[Reducer]] = {
        "hiprune": [HiPrune(**some)],
        "deep layer alone": [HiPrune(**some, alpha=0.0)],
        "object layer alone": [HiPrune(**some, alpha=1.0)],
        "object layer by dispersion": [HiPrune(**some, object_layer=by_curve)],
        "random": [ReduceRandom(Budget(ratio=keep), seed + i) for i in range(random_seeds)],
        "grid": [ReduceGrid(Budget(ratio=keep))],
        "pooling": [ReducePool(Budget(ratio=keep))],
    }
    return {(name, keep): reducers for name, reducers in arms.items()}


class Overlap:
    """Gathers how well the tenth of the tokens with the most attention, by layer, covers what is drawn."""

    def __init__(self, ink: Tensor) -> None:
        self.ink = ink
        self.found: list[Tensor] = []

    def __call__(self, memory: Tensor, context: Context, numbers: slice) -> None:
        """Take a batch of pictures."""
        ink, layers = self.ink[numbers], []
        for layer in range(context.n_layers):
            scores = received(memory, layer, context)
            best = scores.topk(round(0.1 * scores.shape[1]), dim=-1).indices
            chosen = torch.zeros_like(ink).scatter(1, best, True)
            layers.append((chosen & ink).sum(1) / (chosen | ink).sum(1))
        self.found.append(torch.stack(layers, dim=1))

    def by_layer(self) -> list[float]:
        """Return intersection over union, the mean over pictures."""
        return [round(value, 4) for value in torch.cat(self.found).mean(0).tolist()]


def details(readings: Readings, overlap: Overlap, curve: dict[float, Tensor], by_curve: int) -> dict[str, Any]:
    """Return figures beside the claim's own."""
    others = ("random", "pooling", "object layer by dispersion", *RIVALS)
    return {
        "arms": readings.table(),
        "more_than": {name: readings.retained("hiprune", minus=name).to_json() for name in others},
        "object_layer": HiPrune().layers(len(curve[SHARES[0]]), len(curve[SHARES[0]]) - 1)[0],
        "object_layer_by_dispersion": by_curve,
        "dispersion": {f"{share:.0%}": [round(v, 4) for v in values.tolist()] for share, values in curve.items()},
        "overlap_with_ink": overlap.by_layer(),
        "ink": round(float(overlap.ink.float().mean()), 4),
    }


def run(
    seed: int = 0,
    count: int = 40,
    dpi: float = 200.0,
    random_seeds: int = 5,
    also: Sequence[float] = (0.0625,),
    probed: int = 16,
) -> Outcome:
    """Measure what of a formula is read when the decoder sees fewer of the encoder's tokens.

    Parameters
    ----------
    seed : int
        Of the formulas and of random choices.
    count : int
        Formulas.
    dpi : float
        Size of the type they are set in.
    random_seeds : int
        Random choices that are averaged.
    also : sequence of float
        Further shares kept, for the details.
    probed : int
        Other formulas, for the dispersion of each layer. The object layer is the one at 3/8 of all, as in the paper;
        one more arm has the layer at the end of the low plateau, in front of the last layer.
    """
    model = load()
    shown = pages(count, seed, dpi)
    curve = curves(model, pages(probed, PROBED))
    by_curve = plateau_end(curve[SHARES[0]][:-1])
    overlap = Overlap(shown.ink)
    arms = {key: each for keep in (*KEEPS, *also) for key, each in rivals(keep, by_curve, random_seeds, seed).items()}
    readings = read(model, shown, arms, overlap)

    best = max(RIVALS, key=lambda name: readings.retained(name).value)
    controls = ("none", "blind", "random", "pooling", *(name for name in RIVALS if name != best))
    return Outcome(
        method=readings.figure("hiprune"),
        baseline=readings.figure(best),
        controls=tuple(readings.figure(name) for name in controls),
        n=count,
        runs=random_seeds,
        paired_spread=error(readings.retained("hiprune", minus=best)),
        details=details(readings, overlap, curve, by_curve),
    )


CLAIM = Claim(
    slug="hiprune",
    statement="With 50, 25 and 12.5% of the encoder's tokens, on average, a reader of formulas retains at least 0.01 "
    "more with HiPrune than with the best of its deep layer alone, its object layer alone and a strided grid",
    metric="share retained of what the picture adds to one minus the edit distance of symbols",
    direction="higher",
    threshold=0.01,
    effect="difference",
    run=run,
    variation="other formulas, set in type of 250 instead of 200 dots an inch",
    held_out={"dpi": 250.0, "random_seeds": 2, "count": 32, "also": ()},
    model="latex-ocr",
    minutes=8,
    fast={"count": 4, "random_seeds": 1, "also": (), "probed": 4},
)
