"""Cells of a grid, shares of a budget: what reducers that look at places have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenary.reduce.base import Context


def shares(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Split a number into whole parts in proportion to weights, none above its `most`; largest remainders first.

    The parts sum to ``min(total, sum(most))``.
    """
    parts, left = [0] * len(weights), min(total, sum(most))
    free = [i for i, limit in enumerate(most) if limit > 0]
    while left:
        mass = sum(weights[i] for i in free)
        ideal = {i: left * weights[i] / mass if mass > 0 else left / len(free) for i in free}
        full = [i for i in free if ideal[i] >= most[i]]
        if full:  # their part is settled, the others share the rest
            for i in full:
                parts[i], left = most[i], left - most[i]
            free = [i for i in free if i not in full]
            continue
        for i in free:
            parts[i] = math.floor(ideal[i] + 1e-9)
        rest = left - sum(parts[i] for i in free)
        for i in sorted(free, key=lambda i: (parts[i] - ideal[i], i))[:rest]:
            parts[i] += 1
        break
    return parts


def bands(grid: tuple[int, int], count: int) -> list[int]:
    """Cut a grid into `count` cells of about the same shape: how many each band of rows has, from above.

    Cells form a regular grid where `count` has divisors for one that is not far from square; otherwise the bands differ
    by one.
    """
    rows, columns = grid
    ideal = math.sqrt(count * rows / columns)
    fitting = [n for n in range(1, min(rows, count) + 1) if math.ceil(count / n) <= columns]
    regular = [n for n in fitting if count % n == 0 and abs(math.log(n / ideal)) <= math.log(1.6)]
    n = min(regular or fitting, key=lambda n: abs(math.log(n / ideal)))
    return shares(count, [1.0] * n, [columns] * n)


def cells(grid: tuple[int, int], count: int) -> Tensor:
    """Return the cell of each patch of a grid, (rows columns,) int64: `count` cells, 1 to rows x columns."""
    rows, columns = grid
    per_band = bands(grid, count)
    band = torch.arange(rows) * len(per_band) // rows
    first = torch.tensor([0, *per_band]).cumsum(0)[:-1]
    inside = torch.arange(columns) * torch.tensor(per_band)[band][:, None] // columns  # (rows, columns)
    return (first[band][:, None] + inside).flatten()


def partition(x: Tensor, keep: int, context: Context) -> Tensor:
    """Cut the tokens (B, N, D) into `keep` parts that lie together: (B, N) int64, -1 for what may not be kept.

    Parts are cells of the grids, the budget shared out evenly over the views; where tokens are missing already, runs
    of about equal length.
    """
    rows, columns = context.grid
    if context.per_view(x) and context.valid is None:
        most = [rows * columns] * context.views
        parts = shares(keep, [1.0] * context.views, most)
        start, found = 0, []
        for count in parts:
            found.append(cells(context.grid, count) + start if count else torch.full((rows * columns,), -1))
            start += count
        return torch.cat(found).to(x.device).expand(len(x), -1)
    allowed = context.allowed(x)
    rank = allowed.cumsum(-1) - 1
    held = allowed.sum(-1, keepdim=True)
    return torch.where(allowed, rank * torch.minimum(held, held.new_tensor(keep)) // held.clamp_min(1), -1)


def medians(assign: Tensor, count: int) -> Tensor:
    """Return the middle token of each part of `assign` (B, N), as (B, count) indices; -1 for an empty part."""
    order = assign.masked_fill(assign < 0, count).argsort(dim=-1, stable=True)
    held = torch.stack([(assign == part).sum(-1) for part in range(count)], dim=-1)  # (B, count)
    start = held.cumsum(-1) - held
    middle = start + held // 2
    chosen = order.gather(-1, middle.clamp_max(assign.shape[-1] - 1))
    return torch.where(held > 0, chosen, -1)
