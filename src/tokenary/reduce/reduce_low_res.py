"""Control: a smaller picture, of as many patches as there are tokens to keep."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenary.core.budget import Budget
from tokenary.core.card import Card
from tokenary.core.errors import UnsupportedModelError
from tokenary.core.token_map import TokenMap
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.mix import segments

CARD = Card(
    slug="reduce-low-res",
    cls="ReduceLowRes",
    room="reduce",
    title="A picture of lower resolution",
    summary="shrinks the picture before it is encoded: what scaling down costs, which any reducer must beat",
    slot="reduce",
    requires=("images",),
    baseline=True,
)


class ReduceLowRes(Reducer):
    """Shrink the picture to a grid of at most M patches, with the encoder's positions interpolated.

    It acts on pixels, so the encoder saves too. A large picture that the model would cut into crops becomes one view.

    Parameters
    ----------
    keep : Budget
        How much stays; the largest grid of about the same shape that is not above it.
    """

    needs = frozenset({"pixels"})
    kind = "merge"
    exact = False

    def __init__(self, keep: Budget = Budget(ratio=0.25)) -> None:  # noqa: B008 (frozen)
        super().__init__(keep)

    def plan(self, x: Tensor, keep: int, context: Context) -> TokenMap:
        """Return which patches each patch of the smaller picture covers, as means of them; every view is shrunk."""
        if not context.per_view(x):
            raise UnsupportedModelError("a picture can be shrunk only before anything else happens to it")
        rows, columns = context.grid
        down, across = coarse(context.grid, max(1, keep // context.views))
        row, column = torch.arange(rows) * down // rows, torch.arange(columns) * across // columns
        view = torch.arange(context.views)[:, None, None] * down * across
        assign = (view + row[:, None] * across + column).flatten().to(x.device)
        return segments(assign.expand(len(x), -1), context.views * down * across, context.sizes)

    def look(self, encoder: nn.Module, pixels: Tensor, context: Context) -> tuple[Tensor, TokenMap]:
        """Encode pictures (B, S, S, 3) on the small grid: tokens (B, M, D), and the map of patches they cover."""
        net: Any = encoder
        rows, columns = context.grid
        keep = self.count(rows * columns, context)
        down, across = coarse(context.grid, keep)
        patch = net.config.patch
        small = F.interpolate(
            pixels.permute(0, 3, 1, 2).float(), (down * patch, across * patch), mode="bilinear", antialias=True
        ).permute(0, 2, 3, 1)
        patches = small.unflatten(2, (across, patch)).unflatten(1, (down, patch)).transpose(2, 3)
        x = net.patch_embedding(patches.flatten(3).flatten(1, 2).to(net.positions.dtype) / 127.5 - 1)
        places = net.positions[1:].unflatten(0, (rows, columns)).permute(2, 0, 1)[None]
        places = F.interpolate(places.float(), (down, across), mode="bicubic", antialias=True)[0].flatten(1).T
        first = (net.class_token + net.positions[0]).to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x + places.to(x.dtype)], dim=1)
        for block in net.blocks:
            x = block(x)
        return net.norm(x)[:, 1:], self.plan(x[:, :1].expand(-1, rows * columns, -1), keep, context)


def coarse(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """Return the largest grid of at most `keep` cells whose shape is about that of `grid`."""
    rows, columns = grid
    best = (0, 0)
    for down in range(1, min(rows, keep) + 1):
        exact = down * columns // rows
        across = min(exact + 1, columns, keep // down)
        if across >= max(1, exact) and down * across > best[0] * best[1]:
            best = (down, across)
    return best if best[0] else (1, min(keep, columns))
