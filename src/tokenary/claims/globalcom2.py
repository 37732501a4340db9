"""GlobalCom2: a thumbnail that says which crops matter is worth more than the same share for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenary.claims.retention import Key, controls, outcome
from tokenary.claims.scene_reading import Arm, Everything, Readings, about, asked, low_res, opened, read
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Outcome
from tokenary.core.errors import InputError
from tokenary.core.seeding import substream
from tokenary.core.token_map import Select
from tokenary.models.bench_vlm.batches import Questions
from tokenary.models.bench_vlm.canvas import Canvas
from tokenary.models.bench_vlm.model import BenchVLM, anyres_views
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.choose import mask_to_select, top
from tokenary.reduce.globalcom2 import GlobalCom2, crop_ratios, valid_patches
from tokenary.reduce.vlm import ReducedVLM

RATIOS = (0.25, 0.1)
ASKED = ("ocr", "chart", "counting")
VIEWS, CROPS = 5, (2, 2)
METHOD, UNIFORM = "globalcom2", "uniform ratio, own scores"
#: Arms that must keep as many tokens.
MATCHED = (METHOD, UNIFORM, "guided ratio, own scores", "uniform ratio, mixed scores", "random")
Place = Literal["crop", "padded"]


class RandomOfEach(Reducer):
    """Keep random tokens, the same share of each view."""

    needs = frozenset({"pixels"})
    exact = False

    def __init__(self, keep: Budget, seed: int) -> None:
        super().__init__(keep)
        self.seed = seed

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Choose uniformly in each view."""
        drawn = [substream(self.seed, "globalcom2", sample).random(x.shape[1]) for sample in context.samples or ()]
        there = context.allowed(x).unflatten(1, (context.views, -1))
        scores = torch.from_numpy(np.stack(drawn)).unflatten(1, (context.views, -1)).masked_fill(~there, 2.0)
        counts = (there.sum(-1, keepdim=True) * keep / x.shape[1] + 1e-9).floor()
        return mask_to_select((scores.argsort(-1).argsort(-1) < counts).flatten(1))


class Thumbnail(Reducer):
    """Keep nothing but the thumbnail, or what the class token thinks most of in it."""

    needs = frozenset({"queries", "keys"})
    exact = False

    def plan(self, x: Tensor, keep: int, context: Context) -> Select:
        """Choose in view 0 by the logits of the class token, as the method does there."""
        logits = class_logits(context)
        first = torch.arange(x.shape[1]) < logits.shape[1]
        return top(context.by_picture(logits), min(keep, logits.shape[1]), first.expand(len(x), -1))


def class_logits(context: Context) -> Tensor:
    """Return what the class token thinks of the patches of each view, (B V, n)."""
    return context.image(context.attention_logits(rows=slice(0, 1)).mean(1)[:, 0], 1)


# ------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Large:
    """Questions about pictures of twice the side.

    Attributes
    ----------
    held_out : Questions
    valid : (n, 5 N) bool Tensor or None
        Which tokens of the thumbnail and the crops are no padding.
    crop : (n,) Tensor or None
        The crop that shows all that is drawn.
    """

    held_out: Questions
    valid: Tensor | None = None
    crop: Tensor | None = None


def placed(small: Questions, patch: int, seed: int, how: Place) -> Large:
    """Put each scene (S, S, 3) into one part of a picture of twice the side that is empty elsewhere.

    Parameters
    ----------
    small : Questions
        One a scene.
    patch : int
        Pixels of a patch.
    seed : int
        Of places and backgrounds.
    how : {"crop", "padded"}
        ``crop``: it fills one of the four crops. ``padded``: the picture is a band, S high and 2 S wide or the other
        way round, padded with black to a square, and the scene fills one half of it, so that two crops share it.
    """
    pixels, valid, crop = [], [], []
    for number, scene in enumerate(small.batch.pixels):
        side, draw = len(scene), substream(seed, "globalcom2 place", number)
        canvas = Canvas(2 * side, patch, Random(f"globalcom2 {seed} {number}"), "test")
        canvas.background()
        canvas.noise()
        picture, (row, column) = torch.from_numpy(canvas.image), (side * draw.integers(2, size=2)).tolist()
        crop.append((2 * row + column) // side)
        if how == "padded":
            wide, margin = bool(draw.integers(2)), side // 2
            band = picture if wide else picture.transpose(0, 1)
            band[:margin], band[-margin:] = 0, 0
            row, column = (margin, column) if wide else (row, margin)
            size = (side, 2 * side) if wide else (2 * side, side)
            valid.append(valid_patches(size, (side // patch, side // patch), CROPS))
        picture[row : row + side, column : column + side] = scene
        pixels.append(picture)
    held_out = Questions(replace(small.batch, pixels=torch.stack(pixels)), small.scenes, small.turns)
    return Large(held_out, torch.stack(valid)) if how == "padded" else Large(held_out, crop=torch.tensor(crop))


def fullest(held_out: Questions) -> float:
    """Return the share of all drawn pixels that lies in the fullest crop, the mean over large scenes."""
    found = []
    for scene in held_out.scenes:
        half = len(scene.owner) // 2
        parts = (scene.owner > 0).reshape(2, half, 2, half).sum((1, 3))
        found.append(parts.max() / max(1, parts.sum()))
    return round(float(np.mean(found)), 4)


@torch.no_grad()
def glances(model: BenchVLM, held_out: Questions, batch: int = 64) -> Tensor:
    """Return what the class token thinks of the thumbnail of every picture, (n, rows, columns) float64."""
    eyes = ReducedVLM(model, Everything(Budget(ratio=1.0)))
    parts = [anyres_views(pixels)[:, 0] for pixels in held_out.batch.pixels.split(batch)]
    found = [class_logits(eyes.image_tokens(thumbnails).context) for thumbnails in parts]
    return torch.cat(found).double().unflatten(1, eyes.grid)


# ------------------------------------------------------------------------------------------------------- arms


def matching(thumbnails: Tensor, ratio: float, valid: Tensor | None) -> tuple[int, int]:
    """Return how many tokens uniform shares keep, on average, and the budget that guided ones keep as many with.

    Both are cut to whole tokens, uniform shares in every view at once, so that they differ at the same ratio.
    """
    patches = thumbnails[0].numel()
    there = torch.full((1, VIEWS), patches) if valid is None else valid.unflatten(1, (VIEWS, -1)).sum(-1)
    total, target = VIEWS * patches, float((there * ratio + 1e-9).floor().sum(1).mean())

    def miss(tokens: int) -> float:
        crops = crop_ratios(thumbnails, CROPS, tokens / total)
        shares = torch.cat([torch.full_like(crops[:, :1], tokens / total), crops], dim=1)
        return abs(float((there * shares + 1e-9).floor().sum(1).mean()) - target)

    first = int(ratio * total)
    return round(target), min(range(max(VIEWS, first - 2 * VIEWS), min(total, first + 4 * VIEWS)), key=miss)


def rivals(model: BenchVLM, ratio: float, even: int, guided: int, random_seeds: int, seed: int) -> dict[Key, Arm]:
    """Return the arms at one ratio; guided shares have a budget of their own, see `matching`."""
    budget, own, count = Budget(ratio=ratio), Budget(tokens=guided), Budget(tokens=even)
    arms: dict[str, list[Reducer]] = {
        METHOD: [GlobalCom2(own)],
        UNIFORM: [GlobalCom2(budget, ratios="uniform", choice="local")],
        "guided ratio, own scores": [GlobalCom2(own, choice="local")],
        "uniform ratio, mixed scores": [GlobalCom2(budget, ratios="uniform")],
        **controls(count, 0, seed),
        "random": [RandomOfEach(budget, seed + i) for i in range(random_seeds)],
        "thumbnail alone": [Thumbnail(count)],
        "low resolution": [low_res(model, even / (VIEWS * model.config.num_patches), large=True)],
    }
    return {(name, ratio): (reducers, "encoder") for name, reducers in arms.items()}


def measure(
    model: BenchVLM, large: Large, thumbnails: Tensor, random_seeds: int, seed: int, only: Sequence[str] = ()
) -> Readings:
    """Answer questions about large pictures with all arms, or with some."""
    arms: dict[Key, Arm] = {}
    for ratio in RATIOS:
        arms |= rivals(model, ratio, *matching(thumbnails, ratio, large.valid), random_seeds, seed)
    arms = {key: arm for key, arm in arms.items() if not only or key[0] in only}
    return read(model, large.held_out, arms, RATIOS, valid=large.valid, batch=16)


def matched(readings: Readings) -> dict[str, dict[str, float]]:
    """Return the tokens that the arms kept, newlines included.

    Raises
    ------
    InputError
        They differ by more than 1%.
    """
    found = {}
    for ratio in readings.keeps:
        kept = {name: round(readings.kept[name, ratio], 3) for name in MATCHED if (name, ratio) in readings.kept}
        if max(kept.values()) > 1.01 * min(kept.values()):
            raise InputError(f"at a ratio of {ratio} the arms kept different numbers of tokens: {kept}")
        found[f"{ratio:.0%}"] = kept
    return found


def guidance(thumbnails: Tensor, crop: Tensor | None) -> dict[str, float]:
    """Return how far apart the shares of crops are, 1 being the same for all; and that of the crop with the scene."""
    shares = crop_ratios(thumbnails, CROPS, RATIOS[0]) / RATIOS[0]
    found = {"largest": shares.amax(1).mean(), "smallest": shares.amin(1).mean()}
    if crop is not None:
        found |= {"of_the_scene": shares.gather(1, crop[:, None]).mean()}
        found |= {"largest_is_that_of_the_scene": (shares.argmax(1) == crop).double().mean()}
    return {name: round(float(value), 4) for name, value in found.items()}


def run(
    seed: int = 0,
    model: str = "xs-0",
    families: Sequence[str] = (),
    count: int = 160,
    how: Place = "crop",
    random_seeds: int = 5,
    even: int = 96,
) -> Outcome:
    """Measure what is answered about large pictures whose content lies in one place, at 25 and 10% of the tokens.

    The budget is shares of the thumbnail and of all crops; newlines come on top, as many in every arm. Of a model of 64
    tokens a view keeps 16 or 6.

    Parameters
    ----------
    seed : int
        Of the questions, places, and random choices.
    model : str
        A bench VLM that was trained on large pictures too.
    families : sequence of str
        Ask these; by default those of reading, charts and counting whose gate the model has passed.
    count : int
        Questions of each family.
    how : {"crop", "padded"}
        Where the content lies, see `placed`.
    random_seeds : int
        Random choices that are averaged.
    even : int
        Questions of each family about large scenes that are filled evenly, for the details; 0 leaves them out.
    """
    vlm, fit = opened(model, families, ASKED)
    large = placed(asked(vlm, fit, count, seed), vlm.config.patch, seed, how)
    thumbnails = glances(vlm, large.held_out)
    readings = measure(vlm, large, thumbnails, random_seeds, seed)
    details: dict[str, Any] = {
        "model": about(model),
        "left_out": readings.left_out,
        "kept": matched(readings),
        "shares_of_crops": guidance(thumbnails, large.crop),
    }
    if even:
        filled = Large(asked(vlm, fit, even, seed, anyres=True))
        thumbnails = glances(vlm, filled.held_out)
        others = measure(vlm, filled, thumbnails, random_seeds, seed, (METHOD, UNIFORM))
        details["filled_evenly"] = {
            "drawn_in_the_fullest_crop": fullest(filled.held_out),
            "shares_of_crops": guidance(thumbnails, None),
            "more_than_uniform": others.retained(METHOD, minus=UNIFORM).to_json(),
            "kept": matched(others),
            "left_out": others.left_out,
        }
    beside = (*MATCHED[2:4], "grid", "pooling", "thumbnail alone", "low resolution")
    return outcome(readings, METHOD, (UNIFORM,), random_seeds, details, beside)


CLAIM = Claim(
    slug="globalcom2",
    statement="With 25 and 10% of the tokens, on average, of pictures whose content lies in one of four crops, a small "
    "vision-language model retains at least 0.01 more of what the picture adds with GlobalCom2 than with the same "
    "share for each crop, chosen by its own scores",
    metric="share retained of the right answers that the picture adds, the mean over families of questions",
    direction="higher",
    threshold=0.01,
    effect="difference",
    run=run,
    variation="pictures twice as wide as high or the other way round, padded, their content in one half of them",
    held_out={"how": "padded", "random_seeds": 2, "even": 0},
    model="bench-vlm-xs-0",
    minutes=3,
    fast={"count": 8, "random_seeds": 1, "even": 0},
)
