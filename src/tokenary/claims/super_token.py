"""Super tokens: attention among soft ones costs a classifier less accuracy than among the means of a hard grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor

from tokenary.bench.reduction import block_flops
from tokenary.claims.bipartite import BipartiteMerging
from tokenary.claims.cifar_reduction import (
    ONE,
    THREE,
    Arm,
    budget,
    full_arm,
    named_right,
    pictures,
    reduced_arm,
    stem_flops,
    times,
)
from tokenary.claims.super_token_layers import ARMS, CELL, FOLDER, LAYERS, WINDOW, attending, load_tuned
from tokenary.claims.superpixels import superpixels
from tokenary.core.budget import Budget
from tokenary.core.claim import Claim, Outcome, standard_error
from tokenary.models.cifar_vit import CifarViT, ViTConfig, load
from tokenary.models.cifar_vit.loading import SHIPPED
from tokenary.reduce.reduce_grid import ReduceGrid
from tokenary.reduce.reduce_pool import ReducePool
from tokenary.reduce.reduce_random import ReduceRandom
from tokenary.reduce.super_token import SuperToken


def run(
    seed: int = 0, count: int = 5000, start: int = 0, cell: int = CELL, saved: float = 0.4, photos: int | None = None
) -> Outcome:
    """Measure accuracy on CIFAR-10 when the first half of the blocks attends to less, as it is and tuned to it.

    Parameters
    ----------
    seed : int
        Of the random reducers; three follow.
    count, start : int
        Test pictures.
    cell : int
        Side of a cell.
    saved : float
        Share of FLOPs that reducers save, for the details.
    photos : int, optional
        Photographs whose superpixels are measured, for the details; by default all there are.

    Raises
    ------
    InputError
        The classifier or its tuned weights are not there.
    """
    model, tuned = load(), load_tuned(FOLDER, SHIPPED / "model.safetensors")
    pixels, labels = pictures(count, start)
    full = full_arm(model, pixels, labels)
    plain = {arm: layer_arm(model, arm, pixels, labels, cell) for arm in ARMS if arm != "full"}
    found = {}
    for arm in ARMS:
        model.load_state_dict(tuned[arm], strict=False)
        found[arm] = layer_arm(model, arm, pixels, labels, cell)
    model = load()
    reduced = reducers(model, saved, pixels, labels, range(seed, seed + 3))
    method, baseline = found["super tokens"], found["hard grid"]
    return Outcome(
        method=method.figure("super tokens"),
        baseline=baseline.figure("hard grid"),
        controls=(
            full.figure("none"),
            found["full"].figure("full attention, tuned as long"),
            found["random"].figure("random"),
            found["windows"].figure("windows"),
        ),
        n=count,
        paired_spread=standard_error(method.each - baseline.each),
        details={
            "tuned": {arm: each.details(full) for arm, each in found.items()},
            "as_it_is": {arm: each.details(full) for arm, each in plain.items()},
            "over_hard_grid_as_it_is": gain(plain["super tokens"], plain["hard grid"]),
            "reducers": {name: arm.details(full) for name, arm in reduced.items()},
            "reducer_over": {
                name: gain(reduced["super-token"], arm) for name, arm in reduced.items() if name != "super-token"
            },
            "superpixels": superpixels(photos),
        },
    )


def gain(one: Arm, other: Arm) -> dict[str, float]:
    """Return points of accuracy of one arm over another, paired."""
    more = one.each - other.each
    return {"gain": round(float(more.mean()), 3), "spread": round(standard_error(more), 3)}


def layer_arm(model: CifarViT, arm: str, pixels: Tensor, labels: Tensor, cell: int) -> Arm:
    """Name pictures while the first blocks attend in one way."""
    with attending(model, arm, cell=cell):
        right = named_right(model, pixels, labels)
    tokens = (model.prefix + model.grid[0] * model.grid[1],) * model.config.layers
    return Arm(right[None], layer_flops(model.config, arm, cell), tokens)


def layer_flops(config: ViTConfig, arm: str, cell: int) -> int:
    """Multiplications and additions of a picture when the first blocks attend in one way."""
    width, n = config.width, config.grid[0] * config.grid[1]
    whole = block_flops(n + 1, width, inner=4 * width)
    few = -(-config.grid[0] // cell) * -(-config.grid[1] // cell)
    attention = 8 * (n + 1) * width**2 + 4 * (n + 1) ** 2 * width  # of all tokens, as `block_flops` counts it
    if arm == "windows":
        first = 8 * (n + 1) * width**2 + 4 * width * (n * (WINDOW**2 + 1) + n + 1)
    elif arm == "full":
        first = attention
    else:
        first = 8 * (few + 1) * width**2 + 4 * (few + 1) ** 2 * width
        numbers = 1 if arm == "hard grid" else 9  # super tokens of a token
        passes = 3 if arm == "super tokens" else 2  # association, averaging, the way back
        first += 2 * passes * numbers * n * width
    return stem_flops(config) + config.layers * whole + len(LAYERS) * (first - attention)


def reducers(model: CifarViT, saved: float, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> dict[str, Arm]:
    """Measure the method as a reducer, without tuning, against others that save as many FLOPs."""
    once, three = (Budget(tokens=budget(model.config, at, saved)) for at in (ONE, THREE))
    arms = {
        "super-token": ([SuperToken(once)], ONE),
        "pooling": ([ReducePool(once, proportional=True)], ONE),
        "grid": ([ReduceGrid(once)], ONE),
        "random": ([ReduceRandom(once, seed=seed) for seed in seeds], ONE),
        "bipartite merging": ([BipartiteMerging(three)], THREE),
    }
    return {name: reduced_arm(model, which, at, pixels, labels) for name, (which, at) in arms.items()}  # type: ignore[arg-type]


def timing(seed: int) -> dict[str, float]:
    """Measure the time of a pass over that with full attention in all blocks."""
    model = load()
    pixels, _ = pictures(250)
    once = Budget(tokens=budget(model.config, ONE, 0.4))
    arms: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "super tokens": partial(attending, model, "super tokens"),
        "hard grid": partial(attending, model, "hard grid"),
        "as a reducer": partial(SuperToken(once).attach, model, ONE),
        "pooling": partial(ReducePool(once, proportional=True).attach, model, ONE),
    }
    return times(model, arms, pixels)


CLAIM = Claim(
    slug="super-token",
    statement="When the first half of a ViT's blocks attends among a quarter as many super tokens, and their attention "
    "is tuned to it briefly, it names at least 0.5 points more of the test pictures of CIFAR-10 right with soft super "
    "tokens than with the means of a hard grid, tuned alike",
    metric="accuracy on test pictures of CIFAR-10, percent",
    direction="higher",
    threshold=0.5,
    effect="difference",
    run=run,
    variation="other test pictures, cells of 4 x 4 patches instead of the 2 x 2 that were tuned",
    held_out={"start": 5000, "cell": 4, "photos": 0},
    model="cifar-vit",
    minutes=6,
    fast={"count": 400, "photos": 0},
    timing=timing,
)
