"""How well soft super tokens of photographs fit what is on them, for the claim about super tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenary.models.mobile_sam.photographs import photographs
from tokenary.reduce.super_token import Cells, associate
from tokenary.reduce.super_token.association import own_cell, super_tokens


def superpixels(count: int | None, side: int = 240, cell: int = 16, sharpness: float = 8.0) -> dict[str, Any]:
    """Return how even the colours within super tokens of photographs are, and how well their borders fit.

    Tokens are pixels with their colours, standardised in each photograph, times `sharpness`; a pixel belongs to the
    super token that it gives most to.

    Parameters
    ----------
    count : int or None
        Photographs; 0 for none.
    side : int
        Of the middle of a photograph, in pixels.
    cell : int
        Side of a cell.
    sharpness : float
        Factor on colours: the net of the paper learns its own.

    Returns
    -------
    dict
        For a plain grid, and for 1 and 3 rounds: ``variance``, the share of the colours' variance that is left within
        super tokens; ``recall``, the share of strong edges (the largest tenth of colour gradients) with a border of
        super tokens within 2 pixels; ``near_a_border``, the share of all pixels that have one there: by chance alone
        recall would be this.
    """
    if count == 0:
        return {}
    rows: dict[str, list[tuple[float, float, float]]] = {"grid": [], "1 round": [], "3 rounds": []}
    for photograph in photographs(count):
        high, wide = photograph.pixels.shape[:2]
        top, left = (high - side) // 2, (wide - side) // 2
        if top < 0 or left < 0:
            continue
        colours = torch.from_numpy(photograph.pixels[top : top + side, left : left + side]).float().flatten(0, 1)
        x = ((colours - colours.mean(0)) / colours.std(0))[None]
        cells = Cells.of_grid((side, side), (cell, cell))
        for name, rounds in (("grid", 0), ("1 round", 1), ("3 rounds", 3)):
            q = associate(x * sharpness, cells, rounds) if rounds else own_cell(x, cells)
            rows[name].append(fit(x, q, cells, side))
    names = ("variance", "recall", "near_a_border")
    means = {name: np.mean(each, axis=0).round(4).tolist() for name, each in rows.items()}
    return {name: dict(zip(names, each, strict=True)) for name, each in means.items()}


def fit(x: Tensor, q: Tensor, cells: Cells, side: int) -> tuple[float, float, float]:
    """Variance that is left, recall of edges, pixels near a border, of one photograph's pixels (1, N, 3)."""
    hard = torch.nn.functional.one_hot(q.argmax(-1), q.shape[-1]).float()
    means = super_tokens(cells.take(x), hard, cells)  # (1, M, 3)
    around = torch.arange(q.shape[1])[:, None, None].expand(-1, q.shape[2], 1)
    owner = cells.neighbours[around[..., 0], q[0].argmax(-1)]  # (M, T)
    owner = cells.put(owner[None, ..., None].float())[0, :, 0].long()
    left = float((x[0] - means[0, owner]).square().sum() / x.square().sum())
    labels, picture = owner.view(side, side), x.view(side, side, 3)
    edges = _steps(picture)
    strong = (edges >= edges.flatten().quantile(0.9)) & (edges > 0)
    borders = (_steps(labels[..., None].float()) > 0).float()
    near = torch.nn.functional.max_pool2d(borders[None, None], 5, 1, 2)[0, 0] > 0
    return left, float(near[strong].float().mean()), float(near.float().mean())


def _steps(picture: Tensor) -> Tensor:
    """How much each pixel differs from those to its right and below, (S, S)."""
    padded = torch.nn.functional.pad(picture.permute(2, 0, 1)[None], (0, 1, 0, 1), mode="replicate")[0]
    down, right = padded[:, 1:, :-1] - padded[:, :-1, :-1], padded[:, :-1, 1:] - padded[:, :-1, :-1]
    return (down.square() + right.square()).sum(0).sqrt()
