"""What the claims about reducing share that are measured on the CIFAR-10 classifier: arms, accuracy, FLOPs, time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenary.bench.reduction import block_flops
from tokenary.core.claim import Figure, standard_error
from tokenary.data import cifar10
from tokenary.models.cifar_vit import CifarViT, ViTConfig
from tokenary.reduce.base import Point, Reducer

THREE = "vision:25%,50%,75%"  # behind these shares of the blocks
ONE = "vision:25%"


@dataclass(frozen=True)
class Arm:
    """One way of reducing, on some pictures.

    Parameters
    ----------
    right : array of bool
        (seeds, n).
    flops : float
        Of one picture, the choice of tokens included as far as `extra` counts it.
    tokens : tuple of int
        That each block computes.
    """

    right: NDArray[np.bool_]
    flops: float
    tokens: tuple[int, ...]

    @property
    def each(self) -> NDArray[np.float64]:
        """How often each picture was named right, in percent, (n,)."""
        return 100.0 * self.right.mean(0)

    def figure(self, name: str) -> Figure:
        """Accuracy in percent."""
        return Figure.of(name, self.each)

    def details(self, full: Arm) -> dict[str, Any]:
        """Figures as plain JSON types, beside those without reducing."""
        lost = full.each - self.each
        return {
            "accuracy": round(float(self.each.mean()), 2),
            "lost": round(float(lost.mean()), 2),
            "lost_spread": round(standard_error(lost), 3),
            "mflops": round(self.flops / 1e6, 2),
            "flops_saved": round(1 - self.flops / full.flops, 4),
            "tokens": list(self.tokens),
        }


def pictures(count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return test pictures of CIFAR-10 (n, 32, 32, 3) uint8 and their labels (n,)."""
    test = cifar10("test")
    chosen = slice(start, start + count)
    return torch.from_numpy(test.pixels[chosen]), torch.from_numpy(test.labels[chosen])


def schedule(config: ViTConfig, at: str, kept: int) -> tuple[int, ...]:
    """Return how many tokens each block computes, the class token included, when `kept` patches stay in the end."""
    places, patches = Point.parse(at, config.layers).layers, config.grid[0] * config.grid[1]
    left, found = patches, []
    for layer in range(config.layers):
        found.append(1 + left)
        if layer in places:
            left = round(patches * (kept / patches) ** ((places.index(layer) + 1) / len(places)))
    return tuple(found)


def stem_flops(config: ViTConfig) -> int:
    """Multiplications and additions of the stem and the classifier."""
    side, channels, total = config.side, 3, 2 * config.width * config.classes
    for level in reversed(range(config.patch.bit_length() - 1)):
        side, width = side // 2, config.width >> level
        total += 2 * 9 * channels * width * side * side
        channels = width
    return total


def flops(config: ViTConfig, tokens: Sequence[int]) -> int:
    """Multiplications and additions of a picture whose blocks compute so many tokens."""
    return stem_flops(config) + sum(block_flops(n, config.width, inner=4 * config.width) for n in tokens)


def likeness_flops(config: ViTConfig, tokens: Sequence[int]) -> int:
    """What it costs to compare all tokens with those that stay, by one head's keys, and to mix them."""
    steps = [(n - 1, m - 1) for n, m in itertools.pairwise(tokens) if m < n]
    return sum(2 * n * m * (config.width // config.heads + config.width) for n, m in steps)


def budget(config: ViTConfig, at: str, saved: float, extra: bool = False) -> int:
    """Return the most patches that may stay in the end so that at least this share of all FLOPs is saved."""
    patches = config.grid[0] * config.grid[1]
    most = (1 - saved) * flops(config, (1 + patches,) * config.layers)
    for kept in range(patches, 0, -1):
        tokens = schedule(config, at, kept)
        if flops(config, tokens) + (likeness_flops(config, tokens) if extra else 0) <= most:
            return kept
    return 1


@torch.inference_mode()
def named_right(model: CifarViT, pixels: Tensor, labels: Tensor, batch: int = 250) -> NDArray[np.bool_]:
    """Which pictures get the right name, (n,)."""
    parts = [model(part).argmax(-1) for part in pixels.split(batch)]
    return (torch.cat(parts) == labels).numpy()


def reduced_arm(
    model: CifarViT, reducers: Sequence[Reducer], at: str, pixels: Tensor, labels: Tensor, extra: bool = False
) -> Arm:
    """Name pictures with a reducer in the model, or with one a seed.

    Parameters
    ----------
    model : CifarViT
        In its mode for inference.
    reducers : sequence of Reducer
        One a seed; they keep as many tokens.
    at : str
        Where they act.
    pixels, labels : Tensor
        See `pictures`.
    extra : bool
        Count `likeness_flops` too.
    """
    right, tokens = [], (0,)
    for reducer in reducers:
        with reducer.attach(model, at) as reduced:
            right.append(named_right(model, pixels, labels))
            left = dict(zip(reduced.point.layers, [each.shape[-2] for each in reduced.maps], strict=True))
        count, found = reduced.tokens, []
        for layer in range(model.config.layers):
            found.append(model.prefix + count)
            count = left.get(layer, count)
        tokens = tuple(found)
    cost = flops(model.config, tokens) + (likeness_flops(model.config, tokens) if extra else 0)
    return Arm(np.stack(right), cost, tokens)


def full_arm(model: CifarViT, pixels: Tensor, labels: Tensor) -> Arm:
    """Name pictures with all tokens."""
    tokens = (model.prefix + model.grid[0] * model.grid[1],) * model.config.layers
    return Arm(named_right(model, pixels, labels)[None], flops(model.config, tokens), tokens)


@torch.inference_mode()
def times(
    model: CifarViT,
    arms: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    pixels: Tensor,
    repeats: int = 5,
) -> dict[str, float]:
    """Return the time of each arm over that with all tokens: medians, arms taking turns, the first turn thrown away."""
    spent: dict[str, list[float]] = {"none": [], **{name: [] for name in arms}}
    for _ in range(repeats + 1):
        for name, column in spent.items():
            with arms.get(name, nullcontext)():
                start = time.perf_counter()
                model(pixels)
                column.append(time.perf_counter() - start)
    medians = {name: statistics.median(column[1:]) for name, column in spent.items()}
    return {name: round(value / medians["none"], 4) for name, value in medians.items() if name != "none"}
