"""The choice of HiPrune as pure functions, and how its object layer is found."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenary.core.errors import OptionError
from tokenary.reduce.base import Context


def received(x: Tensor, layer: int, context: Context) -> Tensor:
    """Return the attention that each of the tokens (B, N, D) got in a layer: (B, N) float32, at most 1.

    The mean over heads and over all queries. Tokens may have become fewer since: each is asked for by its place.
    """
    start = context.span[0] if context.span is not None else 0
    found = context.attention(layer).mean((1, 2))[:, start:]  # (B V, n)
    scores = context.by_picture(found)
    if scores.shape == x.shape[:2]:
        return scores
    number = _numbers(context.places(x), context.grid)
    if scores.shape != (len(x), context.views * context.grid[0] * context.grid[1]):
        raise OptionError("at", "several places", f"one in which layer {layer} still saw all patches, or the newest")
    return scores.gather(1, number)


def neighbours(place: Tensor, grid: tuple[int, int], wrap: bool = False) -> Tensor:
    """Return the tokens left, right, above and below of each: (B, N, 4) int64, -1 where there is none.

    Parameters
    ----------
    place : Tensor
        (B, N, 3) view, row and column.
    grid : (int, int)
        Rows and columns of a view.
    wrap : bool
        Count on over the ends of rows, and stop at the first and the last patch of the view.
    """
    rows, columns = grid
    view, row, column = (each[..., None] for each in place.unbind(-1))
    steps = torch.tensor([[0, 0, -1, 1], [-1, 1, 0, 0]], device=place.device)
    number, total = _numbers(place, grid), (int(place[..., 0].max()) + 1) * rows * columns
    if wrap:
        beside = number[..., None] - view * rows * columns + columns * steps[0] + steps[1]
        beside = view * rows * columns + beside.clamp(0, rows * columns - 1)
    else:
        row, column = row + steps[0], column + steps[1]
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        beside = ((view * rows + row) * columns + column).masked_fill(~inside, total)
    held = torch.full((len(place), total + 1), -1, device=place.device)  # the last place is outside
    held = held.scatter(1, number, torch.arange(place.shape[1], device=place.device).expand(len(place), -1))
    return held.gather(1, beside.flatten(1)).unflatten(1, (-1, 4))


def hierarchical(
    object_scores: Tensor, deep_scores: Tensor, beside: Tensor, keep: int, anchors: int, allowed: Tensor
) -> Tensor:
    """Choose anchors, what lies beside them, and registers.

    Parameters
    ----------
    object_scores, deep_scores : Tensor
        (B, N), in [0, 1].
    beside : Tensor
        (B, N, 4), see `neighbours`.
    keep, anchors : int
        M, and how many of them are anchors. Where anchors and neighbours are more than M, the best neighbours stay.
    allowed : Tensor
        (B, N) bool, who may be kept.

    Returns
    -------
    Tensor
        (B, N) bool: M a row, or all that are allowed.
    """
    chosen = _largest(object_scores, anchors, allowed)
    targets = beside.masked_fill(~chosen[..., None] | (beside < 0), beside.shape[1]).flatten(1)
    buffers = F.pad(torch.zeros_like(chosen), (0, 1)).scatter(1, targets, True)[:, :-1] & ~chosen
    score = torch.where(buffers, object_scores, deep_scores).double()
    return _largest(score + 4.0 * buffers + 8.0 * chosen, keep, allowed)


def _largest(scores: Tensor, count: int, allowed: Tensor) -> Tensor:
    """Mark the largest scores (B, N), of equal ones the first."""
    order = scores.masked_fill(~allowed, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(allowed).scatter(1, order[:, :count], True) & allowed


def _numbers(place: Tensor, grid: tuple[int, int]) -> Tensor:
    """Number of each patch among all of the whole grids, (B, N)."""
    view, row, column = place.unbind(-1)
    return (view * grid[0] + row) * grid[1] + column


def dispersion(scores: Tensor, features: Tensor, share: float = 0.05) -> Tensor:
    """Return how far apart the tokens with the largest scores lie: (B,) mean distance over all pairs.

    Parameters
    ----------
    scores : Tensor
        (B, N), of one layer.
    features : Tensor
        (B, N, D), of the last layer.
    share : float
        How many tokens count; the paper takes 5%, 10% and 25%.
    """
    count = max(2, round(share * scores.shape[1]))
    chosen = scores.topk(count, dim=-1).indices[..., None].expand(-1, -1, features.shape[-1])
    points = features.gather(1, chosen).float()
    apart = torch.cdist(points, points)
    return apart.sum((1, 2)) / (count * (count - 1))


def plateau_end(curve: Tensor, tolerance: float = 0.1) -> int:
    """Return the last layer of the low plateau of a dispersion curve (n_layers,): the object layer.

    Around the lowest value the plateau reaches as far as values rise by no more than `tolerance` of the whole range.
    """
    low, high = float(curve.min()), float(curve.max())
    layer = int(curve.argmin())
    while layer + 1 < len(curve) and float(curve[layer + 1]) <= low + tolerance * (high - low):
        layer += 1
    return layer
