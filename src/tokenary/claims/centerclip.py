"""CenterCLIP: clips are found better by the medoids of their segments than by a uniform sample of as many tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tokenary.bench.reduction import block_flops
from tokenary.claims.cifar_reduction import times
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Figure, Outcome, standard_error
from tokenary.core.seeding import substream
from tokenary.models.bench_vlm.assets import PHOTOS, assets
from tokenary.models.video_text import Gallery, VideoText, gallery, load, panned, similarity
from tokenary.models.video_text.clips import FRAMES
from tokenary.models.video_text.retrieval import ranks, twins
from tokenary.reduce.base import Point, Reducer
from tokenary.reduce.centerclip import CenterCLIP
from tokenary.reduce.reduce_frame_pool import ReduceFramePool
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_random import ReduceRandom

NONE, METHOD, BASELINE = "none", "k-medoids", "uniform"
ARMS = (METHOD, "frame pooling", BASELINE, "random")
AT = "vision:50%"  # where the network was tuned to fewer tokens
SEGMENTS = 3

Array = NDArray[np.float64]


def attached(model: VideoText, arm: str, frames: int, seed: int = 0) -> AbstractContextManager[Any]:
    """Let the frame encoder join the frames of each of three segments, and keep as many tokens as one frame has.

    ``uniform`` takes the same places of every frame; ``none`` joins nothing.
    """
    keep, joined = Budget(tokens=patches(model)), frames // SEGMENTS
    reducers: dict[str, Reducer] = {
        METHOD: CenterCLIP(keep, frames=joined),
        "frame pooling": ReduceFramePool(frames=joined),
        BASELINE: ReduceGrid(keep),
        "random": ReduceRandom(keep, seed=seed),
    }
    return nullcontext() if arm == NONE else reducers[arm].attach(model.vision, AT, join=joined)


def patches(model: VideoText) -> int:
    """Return how many patches a frame has."""
    return model.vision.grid[0] * model.vision.grid[1]


def run(
    seed: int = 0, galleries: int = 4, size: int = 500, frames: int = FRAMES, ways: int = 4, photos: int = len(PHOTOS)
) -> Outcome:
    """Find clips by their captions, with the network tuned to each way of reducing, and with the one tuned to none.

    Parameters
    ----------
    seed : int
        Of clips and random tokens.
    galleries : int
        Sets of clips; figures are over all captions.
    size : int
        Clips of one.
    frames : int
        Of a clip; a third is a segment, and of each as many tokens stay as one frame has.
    ways : int
        Of a camera over each photograph, for the details.
    photos : int
        Photographs.

    Raises
    ------
    InputError
        The network is not there.
    """
    models = {arm: load(arm) for arm in (NONE, *ARMS)}
    tuned: dict[str, list[Array]] = {arm: [] for arm in models}
    plain: dict[str, list[Array]] = {arm: [] for arm in ARMS}
    order: list[NDArray[np.bool_]] = []
    groups: list[NDArray[np.int64]] = []
    for number in range(galleries):
        shown = gallery("test", galleries * seed + number, size, frames)
        for arm, model in models.items():
            tuned[arm].append(measured(model, shown, partial(attached, model, arm, frames, seed)))
        for arm, rows in plain.items():
            rows.append(measured(models[NONE], shown, partial(attached, models[NONE], arm, frames, seed)))
        order.append(np.array([story.twin is not None for story in shown.stories]))
        groups.append(
            number * size + np.array([min(i, t) if t >= 0 else i for i, t in enumerate(twins(shown.stories))])
        )
    scores = {arm: np.concatenate(rows, axis=1) for arm, rows in tuned.items()}
    untuned = {arm: np.concatenate(rows, axis=1) for arm, rows in plain.items()}
    ordered, group = np.concatenate(order), np.concatenate(groups)

    def over(one: Array, other: Array) -> dict[str, float]:
        gain, spread, low, high = bootstrap(one[0] - other[0], group, seed)
        return {"gain": round(gain, 3), "spread": round(spread, 3), "low": round(low, 3), "high": round(high, 3)}

    figures = {arm: Figure(arm, *bootstrap(each[0], group, seed)[:2]) for arm, each in scores.items()}
    return Outcome(
        method=figures[METHOD],
        baseline=figures[BASELINE],
        controls=(figures[NONE], figures["frame pooling"], figures["random"]),
        n=scores[METHOD].shape[1],
        paired_spread=bootstrap(scores[METHOD][0] - scores[BASELINE][0], group, seed)[1],
        details={
            "tuned": {arm: summary(each, ordered) for arm, each in scores.items()},
            "untuned": {arm: summary(each, ordered) for arm, each in untuned.items()},
            "over": {arm: over(scores[METHOD], each) for arm, each in scores.items() if arm != METHOD},
            "untuned_over": {arm: over(untuned[METHOD], each) for arm, each in untuned.items() if arm != METHOD},
            "order_captions": int(ordered.sum()),
            "mflops": {arm: round(flops(models[NONE], arm, frames) / 1e6, 1) for arm in models},
            "photographs": coverage(models[NONE], frames, ways, photos, seed),
        },
    )


def measured(model: VideoText, shown: Gallery, within: Callable[[], AbstractContextManager[Any]]) -> Array:
    """Return for each caption, in percent, whether its clip comes first, among five, and before its twin: (3, K).

    The last is nan where the twin is not there.
    """
    cosines = similarity(model, shown, within)
    rank, other = ranks(cosines), torch.tensor(twins(shown.stories))
    own, its = cosines.diagonal(), cosines.gather(1, other.clamp_min(0)[:, None])[:, 0]
    before = torch.where(other < 0, torch.nan, (own > its).double())
    return 100.0 * torch.stack([(rank == 0).double(), (rank < 5).double(), before]).numpy()


def summary(scores: Array, ordered: NDArray[np.bool_]) -> dict[str, float]:
    """Return means of `measured`, those of captions that say an order apart."""
    return {
        "recall_at_1": round(float(scores[0].mean()), 2),
        "recall_at_5": round(float(scores[1].mean()), 2),
        "order_recall_at_1": round(float(scores[0, ordered].mean()), 2),
        "other_recall_at_1": round(float(scores[0, ~ordered].mean()), 2),
        "before_its_twin": round(float(np.nanmean(scores[2])), 2),
    }


def bootstrap(
    values: Array, group: NDArray[np.int64], seed: int, draws: int = 2000
) -> tuple[float, float, float, float]:
    """Return the mean of values (n,), its standard error and its 95% interval, drawing whole groups (twins)."""
    _, place = np.unique(group, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)
    n = len(counts)
    weights = substream(seed, "centerclip", "bootstrap").multinomial(n, np.full(n, 1 / n), size=draws)
    means = weights @ sums / (weights @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(means.std(ddof=1)), float(low), float(high)


def flops(model: VideoText, arm: str, frames: int) -> int:
    """Multiplications and additions of a clip in the blocks, and in the distances between tokens."""
    config, front = model.config, Point.parse(AT, model.config.layers).layers[-1] + 1
    frame = block_flops(1 + patches(model), config.width, inner=4 * config.width)
    behind = frames if arm == NONE else SEGMENTS
    extra = 2 * SEGMENTS * (frames // SEGMENTS * patches(model)) ** 2 * config.width if arm == METHOD else 0
    return frame * (front * frames + (config.layers - front) * behind) + extra


def coverage(model: VideoText, frames: int, ways: int, photos: int, seed: int) -> dict[str, Any]:
    """Measure which part of what a camera saw of photographs is in the patches that stay."""
    shown = [(photo, *panned(photo, seed, way, frames)) for photo in range(photos) for way in range(ways)]
    if not shown:
        return {}
    pixels, shares = torch.from_numpy(np.stack([each[1] for each in shown])), dict[str, Array]()
    for arm in (METHOD, BASELINE, "random"):
        with torch.inference_mode(), attached(model, arm, frames, seed) as reduced:
            model(pixels)
        place = reduced.place.clone()  # (clips segments, M, 3)
        place[..., 0] += (torch.arange(len(place)) % SEGMENTS * (frames // SEGMENTS))[:, None]
        kept = place.unflatten(0, (-1, SEGMENTS)).flatten(1, 2).numpy()
        every = np.argwhere(np.ones((frames, *model.vision.grid)))
        shares[arm] = np.array(
            [
                100.0 * covered(windows, stay, photo, model).sum() / covered(windows, every, photo, model).sum()
                for (photo, _, windows), stay in zip(shown, kept, strict=True)
            ]
        )
    more = shares[METHOD] - shares[BASELINE]
    return {
        "clips": len(shown),
        "covered": {arm: round(float(each.mean()), 2) for arm, each in shares.items()},
        "over_uniform": {"gain": round(float(more.mean()), 2), "spread": round(standard_error(more), 2)},
    }


def covered(windows: Array, place: NDArray[np.int64], photo: int, model: VideoText) -> NDArray[np.bool_]:
    """Return which pixels of a photograph lie in patches at these frames, rows and columns (M, 3)."""
    seen, rows = np.zeros(assets().photos[photo].shape[:2], bool), model.vision.grid[0]
    for frame, row, column in place.tolist():
        top, left, side = windows[frame]
        (a, b), (c, d) = (
            (round(start + i * side / rows), round(start + (i + 1) * side / rows))
            for start, i in ((top, row), (left, column))
        )
        seen[a:b, c:d] = True
    return seen


def timing(seed: int) -> Mapping[str, float]:
    """Measure the time of a batch of clips over that with all tokens."""
    model, shown = load(), gallery("test", seed, 16)
    arms: Sequence[str] = ARMS
    return times(cast(Any, model), {arm: partial(attached, model, arm, FRAMES, seed) for arm in arms}, shown.pixels)


CLAIM = Claim(
    slug="centerclip",
    statement="When halfway through a frame encoder each third of a clip goes on with as many tokens as one frame has, "
    "and the blocks behind are tuned to it, the right one of 500 clips is found by its caption at least 1 point more "
    "often with the medoids of their clusters than with uniformly sampled tokens, tuned alike",
    metric="text-to-video R@1 among 500 rendered clips, percent",
    direction="higher",
    threshold=1.0,
    effect="difference",
    run=run,
    variation="24 frames a clip instead of the 12 that were tuned, the number of tokens as before",
    held_out={"frames": 24, "galleries": 2},
    model="video-text",
    minutes=8,
    fast={"galleries": 1, "size": 60, "ways": 1, "photos": 2},
    timing=timing,
)
