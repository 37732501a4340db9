"""What the thumbnail says about crops, and which part of them shows the picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_ratios(thumbnail: Tensor, crops: tuple[int, int], ratio: float, tau: float = 10.0) -> Tensor:
    """Return which share each crop keeps.

    Parameters
    ----------
    thumbnail : Tensor
        (B, rows, columns) scores.
    crops : (int, int)
        Rows and columns of crops. Rows and columns of the map that are left over go to the last of them.
    ratio : float
        R.
    tau : float
        Temperature; the smaller, the more the crops differ.

    Returns
    -------
    Tensor
        (B, n), row by row; the mean is R where none is cut at 1.
    """
    (down, across), (rows, columns) = crops, thumbnail.shape[1:]
    row = (torch.arange(rows, device=thumbnail.device) // max(1, rows // down)).clamp_max(down - 1)
    column = (torch.arange(columns, device=thumbnail.device) // max(1, columns // across)).clamp_max(across - 1)
    crop = F.one_hot((row[:, None] * across + column).flatten(), down * across)  # (rows columns, n)
    mass = thumbnail.flatten(1) @ crop.to(thumbnail.dtype)
    part = ((mass - mass.amax(1, keepdim=True)) / tau).softmax(1)
    return (ratio * (1 + part - part.mean(1, keepdim=True))).clamp_max(1)


def crop_scores(thumbnail: Tensor, crops: tuple[int, int], there: Tensor) -> Tensor:
    """Resize the thumbnail's map (B, rows, columns) to the area of the picture, and cut it as crops are: (B, n, N).

    ``there`` (B, n, N) bool says which patches of crops are of the picture; the area is the rectangle around them.
    """
    grid = (thumbnail.shape[1], thumbnail.shape[2])
    large = there.unflatten(2, grid).unflatten(1, crops).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    found = torch.zeros_like(large, dtype=thumbnail.dtype)
    for row, area in enumerate(large):
        down, across = area.any(1).nonzero()[:, 0], area.any(0).nonzero()[:, 0]
        if len(down):
            top, left = int(down[0]), int(across[0])
            size = (int(down[-1]) + 1 - top, int(across[-1]) + 1 - left)
            map = F.interpolate(thumbnail[row, None, None], size, mode="bilinear", align_corners=False)
            found[row, top : top + size[0], left : left + size[1]] = map[0, 0]
    cut = found.unflatten(2, (crops[1], grid[1])).unflatten(1, (crops[0], grid[0])).transpose(2, 3)
    return cut.flatten(3, 4).flatten(1, 2)


def unpadded(size: tuple[int, int], grid: tuple[int, int], crops: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns of the large grid that show a picture of `size` (height, width), padded to fit it.

    The picture was made as large as fits and put into the middle.
    """
    high, wide = (cells * parts for cells, parts in zip(grid, crops, strict=True))
    height, width = size
    if width * high > wide * height:  # wider than the grid
        margin = (high - max(1, height * wide // width)) // 2
        return slice(margin, high - margin), slice(0, wide)
    margin = (wide - max(1, width * high // height)) // 2
    return slice(0, high), slice(margin, wide - margin)


def valid_patches(size: tuple[int, int], grid: tuple[int, int], crops: tuple[int, int]) -> Tensor:
    """Return which tokens, of a thumbnail and crops, show a picture of `size` (height, width): (V rows columns,)."""
    (rows, columns), (down, across) = grid, crops
    large = torch.zeros(down * rows, across * columns, dtype=torch.bool)
    large[unpadded(size, grid, crops)] = True
    parts = large.unflatten(1, (across, columns)).unflatten(0, (down, rows)).transpose(1, 2)
    return torch.cat([torch.ones(rows * columns, dtype=torch.bool), parts.flatten()])
