"""Patches: which of them a map's outputs stand for, which a picture's objects cover, and where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenary.core.token_map import TokenMap
from tokenary.reduce.base import places
from tokenary.reduce.mix import Mix


def mass_of(chosen: TokenMap) -> Tensor:
    """Return the part of each source that every output stands for, (*batch, M, N) float32."""
    return chosen.mass.float() if isinstance(chosen, Mix) else chosen.support().dense()


def patches_of(asked: Tensor, grid: tuple[int, int], views: int) -> Tensor:
    """Bring patches (B, rows, columns) of a picture to the views that are seen of it, (B, N) bool.

    Parameters
    ----------
    asked : Tensor
        Of the picture's own grid, once or twice as fine as that of a view.
    grid : (int, int)
        Of a view.
    views : int
        1, or 5 for a thumbnail and four crops.
    """
    rows, columns = grid
    if asked.shape[1] == rows:
        return asked.flatten(1)
    crops = asked.unflatten(2, (2, columns)).unflatten(1, (2, rows)).transpose(2, 3)  # (B, 2, 2, rows, columns)
    thumbnail = asked.unflatten(2, (columns, 2)).unflatten(1, (rows, 2)).any(4).any(2)
    return thumbnail.flatten(1) if views == 1 else torch.cat([thumbnail.flatten(1), crops.flatten(1)], dim=1)


def large_places(grid: tuple[int, int], views: int) -> Tensor:
    """Return row and column of every patch, view after view, in patches of the finest grid: (N, 2) float32."""
    place = places(grid, views).float()
    if views == 1:
        return place[:, 1:]
    rows, columns = grid
    crop = place[:, :1] - 1
    inside = torch.cat([crop // 2 * rows, crop % 2 * columns], dim=1) + place[:, 1:]
    return torch.where(place[:, :1] == 0, 2 * place[:, 1:] + 0.5, inside)
