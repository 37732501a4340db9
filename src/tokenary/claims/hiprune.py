"""HiPrune: the tokens of two layers of an encoder together are worth more than those of either."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tokenary.claims import formula_reading, scene_reading
from tokenary.claims.retention import KEEPS, Answers, controls, outcome
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Outcome
from tokenary.models import latex_ocr
from tokenary.models.bench_vlm.batches import Questions
from tokenary.models.bench_vlm.model import BenchVLM
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.hiprune import HiPrune, dispersion, plateau_end, received
from tokenary.reduce.idpruner import IDPruner
from tokenary.reduce.vlm import ReducedVLM

PROBED = 99  # seed of the pictures that dispersion is taken of; none of them is measured
SHARES = (0.05, 0.1, 0.25)
RIVALS = ("deep layer alone", "object layer alone", "grid")
Bed = Literal["scenes", "formulas"]


def curves(looks: Iterable[tuple[Tensor, Context]]) -> dict[float, Tensor]:
    """Return how far apart the tokens with the most attention lie, by layer, for several shares: (n_layers,) each.

    Takes batches of what the last layer returns (B, N, D), with what is known of it.
    """
    found: dict[float, list[Tensor]] = {share: [] for share in SHARES}
    for features, context in looks:
        scores = [received(features, layer, context) for layer in range(context.n_layers)]
        for share, column in found.items():
            column.append(torch.stack([dispersion(each, features, share) for each in scores], dim=1))
    return {share: torch.cat(column).mean(0) for share, column in found.items()}


def by_dispersion(curve: dict[float, Tensor]) -> int:
    """Return the layer at the end of the low plateau, in front of the last."""
    return plateau_end(curve[SHARES[0]][:-1])


def rivals(keep: float, by_curve: int, random_seeds: int, seed: int) -> dict[str, list[Reducer]]:
    """Return the arms at one share kept."""
    some: dict[str, Any] = {"keep": Budget(ratio=keep)}
    return {
        "hiprune": [HiPrune(**some)],
        "deep layer alone": [HiPrune(**some, alpha=0.0)],
        "object layer alone": [HiPrune(**some, alpha=1.0)],
        "object layer by dispersion": [HiPrune(**some, object_layer=by_curve)],
        **controls(Budget(ratio=keep), random_seeds, seed),
    }


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
            layers.append((chosen & ink).sum(1) / (chosen | ink).sum(1).clamp_min(1))
        self.found.append(torch.stack(layers, dim=1))

    def by_layer(self) -> list[float]:
        """Return intersection over union, the mean over pictures."""
        return [round(value, 4) for value in torch.cat(self.found).mean(0).tolist()]


def details(answers: Answers, overlap: Overlap, curve: dict[float, Tensor]) -> dict[str, Any]:
    """Return figures beside those of the arms."""
    layers, covered = len(curve[SHARES[0]]), overlap.by_layer()
    return {
        "below_random_or_grid": any(answers.retained("hiprune", minus=name).high < 0 for name in ("random", "grid")),
        "object_layer": HiPrune().layers(layers, layers - 1)[0],
        "object_layer_by_dispersion": by_dispersion(curve),
        "dispersion": {f"{share:.0%}": [round(v, 4) for v in values.tolist()] for share, values in curve.items()},
        "overlap_with_ink": covered,
        "a_middle_layer_covers_most": max(covered[1:-1], default=0.0) > max(covered[0], covered[-1]),
        "ink": round(float(overlap.ink.float().mean()), 4),
    }


# ------------------------------------------------------------------------------------------------------- beds


@torch.no_grad()
def on_formulas(
    count: int, seed: int, dpi: float, keeps: Sequence[float], random_seeds: int, probed: int
) -> tuple[Answers, dict[str, Any]]:
    """Read formulas with a pretrained network of 1,024 tokens."""
    model, shown = latex_ocr.load(), formula_reading.pages(count, seed, dpi)
    others = formula_reading.pages(probed, PROBED).pixels.split(8)
    curve = curves(formula_reading.see(model, pixels) for pixels in others)
    overlap = Overlap(shown.ink)
    arms = {
        (name, keep): reducers
        for keep in keeps
        for name, reducers in rivals(keep, by_dispersion(curve), random_seeds, seed).items()
    }
    readings = formula_reading.read(model, shown, arms, overlap)
    return readings, details(readings, overlap, curve)


@torch.no_grad()
def on_scenes(
    name: str, families: Sequence[str], count: int, seed: int, keeps: Sequence[float], random_seeds: int, probed: int
) -> tuple[Answers, dict[str, Any]]:
    """Answer questions about scenes with a small model of our own."""
    model, fit = scene_reading.opened(name, families)
    others = scene_reading.asked(model, fit, -(-probed // len(fit)), PROBED, calibrating=True)
    curve = curves(looks(model, others.batch.pixels))
    held_out = scene_reading.asked(model, fit, count, seed)
    overlap = Overlap(drawn(held_out))
    arms: dict[tuple[str, float], scene_reading.Arm] = {}
    for keep in keeps:
        some: dict[str, Any] = {"keep": Budget(ratio=keep)}
        more: dict[str, list[Reducer]] = {
            "hiprune, an anchor at least": [HiPrune(**some, min_anchors=1)],
            "attention of the class token": [IDPruner(**some, weight=1.0, positions="compact")],
            "low resolution": [scene_reading.low_res(model, keep)],
        }
        here = rivals(keep, by_dispersion(curve), random_seeds, seed) | more
        arms |= {(arm, keep): (reducers, "encoder") for arm, reducers in here.items()}
    readings = scene_reading.read(model, held_out, arms, look=overlap)
    patches = model.config.num_patches
    anchors = {f"{keep:.2%}": round(int(keep * patches) * HiPrune().alpha / 5) for keep in keeps}
    about = {"model": scene_reading.about(name), "left_out": readings.left_out, "anchors": anchors}
    return readings, {**about, **details(readings, overlap, curve)}


def looks(model: BenchVLM, pixels: Tensor, batch: int = 32) -> Iterable[tuple[Tensor, Context]]:
    """Encode pictures (n, S, S, 3): what the last layer returns of their patches, and what is known of them."""
    eyes = ReducedVLM(model, scene_reading.Everything(Budget(ratio=1.0)))
    for part in pixels.split(batch):
        yield model.vision(part).last_hidden_state[:, 1:], eyes.image_tokens(part).context


def drawn(held_out: Questions) -> Tensor:
    """Return the patches (n, N) bool that show something of an object."""
    whole = [scene.patches(tuple(range(1, len(scene.items) + 1))) for scene in held_out.scenes]
    return torch.stack([torch.from_numpy(patches).flatten() for patches in whole])


def run(
    seed: int = 0,
    bed: Bed = "scenes",
    model: str = "xs-0",
    families: Sequence[str] = (),
    count: int = 128,
    dpi: float = 200.0,
    random_seeds: int = 5,
    also: Sequence[float] = (0.0625,),
    probed: int = 64,
) -> Outcome:
    """Measure what is read when a decoder or a language model sees fewer of an encoder's tokens.

    With 25 tokens or fewer there is no anchor, and the method is its deep layer alone. Of 64 tokens (size xs) that is
    so at every share below one half, and large pictures do not help, as each view has a budget of its own: it needs a
    model of 256 tokens (s-mini), or the formulas. One more arm always has an anchor.

    Parameters
    ----------
    seed : int
        Of the pictures and of random choices.
    bed : {"scenes", "formulas"}
        A bench VLM that answers questions, or a pretrained network that reads formulas.
    model : str
        The bench VLM.
    families : sequence of str
        Ask it these; by default those whose gate it has passed.
    count : int
        Formulas, or questions of each family.
    dpi : float
        Size of the type that formulas are set in.
    random_seeds : int
        Random choices that are averaged.
    also : sequence of float
        Further shares kept, for the details.
    probed : int
        Other pictures, for the dispersion of each layer. The object layer is the one at 3/8 of all, as in the paper;
        one more arm has the layer at the end of the low plateau, in front of the last layer.
    """
    keeps = (*KEEPS, *also)
    if bed == "formulas":
        answers, found = on_formulas(count, seed, dpi, keeps, random_seeds, probed)
    else:
        answers, found = on_scenes(model, families, count, seed, keeps, random_seeds, probed)
    return outcome(answers, "hiprune", RIVALS, random_seeds, found, ("pooling",))


CLAIM = Claim(
    slug="hiprune",
    statement="With 50, 25 and 12.5% of the encoder's tokens, on average, at least 0.01 more of what the picture adds "
    "is retained with HiPrune than with the best of its deep layer alone, its object layer alone and a strided grid",
    metric="share retained of what the picture adds to right answers, the mean over families of questions",
    direction="higher",
    threshold=0.01,
    effect="difference",
    run=run,
    variation="a pretrained reader of formulas with 1,024 tokens; what the picture adds to one minus the edit distance "
    "of symbols",
    held_out={"bed": "formulas", "dpi": 250.0, "random_seeds": 2, "count": 32, "also": (), "probed": 16},
    model="bench-vlm-xs-0",
    minutes=7,
    fast={"count": 8, "random_seeds": 1, "also": (), "probed": 8},
)
