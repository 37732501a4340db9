"""Tokens in cells, each with the super tokens of the cells around its own: 9 numbers a token, never N x M."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

Borders = Literal["mask", "zero"]


@dataclass(frozen=True)
class Cells:
    """Which tokens lie in which cell, and which cells lie around it.

    Leading b is 1, where all pictures are cut alike, or B.

    Parameters
    ----------
    tokens : (b, M, T) Tensor
        Tokens of every cell, -1 where a cell has fewer than T.
    neighbours : (M, K) Tensor
        Cells around every cell and itself, -1 outside the grid.
    slot : (b, N) Tensor
        Where in (M T) each token stands, -1 nowhere.
    """

    tokens: Tensor
    neighbours: Tensor
    slot: Tensor

    @classmethod
    def cut(cls, assign: Tensor, neighbours: Tensor, room: int = 0) -> Self:
        """Put tokens into their cells.

        Parameters
        ----------
        assign : Tensor
            (b, N) the cell of each token, -1 for none.
        neighbours : Tensor
            (M, K).
        room : int
            Least T.
        """
        count, (batch, n) = len(neighbours), assign.shape
        cell = assign.masked_fill(assign < 0, count)
        held = F.one_hot(cell, count + 1).sum(1)  # (b, M + 1)
        room = max(room, int(held[:, :count].max()))
        order = cell.argsort(dim=1, stable=True)
        ordered = cell.gather(1, order)
        rank = torch.arange(n, device=assign.device) - (held.cumsum(1) - held).gather(1, ordered)
        slot = torch.empty_like(order).scatter_(1, order, ordered * room + rank)
        slot = slot.masked_fill(assign < 0, -1)
        tokens = torch.full((batch, count * room + 1), -1, device=assign.device)
        numbers = torch.arange(n, device=assign.device).expand(batch, -1)
        tokens.scatter_(1, slot.masked_fill(slot < 0, count * room), numbers)
        return cls(tokens[:, :-1].unflatten(1, (count, room)), neighbours, slot)

    @classmethod
    def of_grid(cls, grid: tuple[int, int], cell: tuple[int, int], device: torch.device | None = None) -> Self:
        """Cut a grid into cells of one size; those at the right and at the bottom may be smaller."""
        (rows, columns), (high, wide) = grid, cell
        down, across = -(-rows // high), -(-columns // wide)
        row = torch.arange(rows, device=device)[:, None] // high
        assign = (row * across + torch.arange(columns, device=device) // wide).view(1, -1)
        numbers = F.pad(torch.arange(down * across, device=device).view(down, across), (1, 1, 1, 1), value=-1)
        around = [numbers[i : i + down, j : j + across].flatten() for i, j in product(range(3), range(3))]
        return cls.cut(assign, torch.stack(around, dim=1), high * wide)

    @cached_property
    def there(self) -> Tensor:
        """Which slots hold a token, (b, M, T) bool."""
        return self.tokens >= 0

    @cached_property
    def near(self) -> Tensor:
        """Which neighbours exist and hold tokens, (b, M, K) bool."""
        filled = self.there.any(-1)  # (b, M)
        return (self.neighbours >= 0) & filled[:, self.neighbours.clamp_min(0)]

    def take(self, x: Tensor) -> Tensor:
        """Bring tokens (B, N, D) into their cells, (B, M, T, D), zeros where there is none."""
        own = _rows(x, self.tokens.clamp_min(0).flatten(1)).unflatten(1, self.tokens.shape[1:])
        return own if bool(self.there.all()) else own * self.there[..., None]

    def put(self, own: Tensor) -> Tensor:
        """Bring (B, M, T, D) back to tokens (B, N, D), zeros for those in no cell."""
        x = _rows(own.flatten(1, 2), self.slot.clamp_min(0))
        return x if bool((self.slot >= 0).all()) else x * (self.slot >= 0)[..., None]

    def unfold(self, s: Tensor) -> Tensor:
        """Show every cell the super tokens (B, M, D) around it, (B, M, K, D), zeros outside the grid."""
        around = s.index_select(1, self.neighbours.clamp_min(0).flatten()).unflatten(1, self.neighbours.shape)
        return around * (self.neighbours >= 0)[..., None]

    def fold(self, parts: Tensor) -> Tensor:
        """Add up what every cell gives to those around it, (B, M, K, D) to (B, M, D); outside the grid it is lost."""
        count = len(self.neighbours)
        index = self.neighbours.masked_fill(self.neighbours < 0, count).flatten()
        total = parts.new_zeros(len(parts), count + 1, parts.shape[-1])
        return total.index_add(1, index, parts.flatten(1, 2))[:, :count]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (b, n) of x (B, N, D)."""
    if len(index) == 1:
        return x.index_select(1, index[0])
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def associate(x: Tensor, cells: Cells, rounds: int = 1, tau: float = 1.0, borders: Borders = "mask") -> Tensor:
    """Return how much of each token belongs to the super tokens around it: Q, without a gradient.

    q[p, n] = softmax over the cells n around that of p of x_p s_n / sqrt(D);    s starts as the mean of each cell, and
    is made anew from q between two rounds.

    Parameters
    ----------
    x : Tensor
        (B, N, D).
    cells : Cells
        Where tokens lie.
    rounds : int
        1 in all published sizes.
    tau : float
        Divides the exponent; 1 in the paper, 0 gives each token to the one super token that fits best.
    borders : {"mask", "zero"}
        Neighbours outside the grid get nothing; or, as in the authors' code, they are zero vectors that take weight,
        which is lost. Cells that are cut off are filled up with zero tokens then.

    Returns
    -------
    Tensor
        (B, M, T, K).
    """
    own = cells.take(x).float()  # (B, M, T, D)
    zero = borders == "zero"
    there = torch.ones_like(cells.there) if zero else cells.there
    even = there / there.sum(-1, keepdim=True).clamp_min(1)  # (b, M, T)
    s = (even[..., None] * own).sum(2)
    for done in range(1, rounds + 1):
        logits = own @ cells.unfold(s).mT / own.shape[-1] ** 0.5  # (B, M, T, K)
        if not zero:
            logits = logits.masked_fill(~cells.near[:, :, None], float("-inf"))
        q = F.one_hot(logits.argmax(-1), logits.shape[-1]).float() if tau == 0 else (logits / tau).softmax(-1)
        if not zero:
            q = q.masked_fill(~there[..., None], 0.0)  # also cells without any token
        if done < rounds:
            s = super_tokens(own, q, cells)
    return q


def own_cell(x: Tensor, cells: Cells) -> Tensor:
    """Return the Q of a hard grid, (B, M, T, K): each token belongs to its own cell."""
    itself = cells.neighbours == torch.arange(len(cells.neighbours), device=x.device)[:, None]
    return (cells.there[..., None] & itself[:, None]).float().expand(len(x), -1, -1, -1)


def super_tokens(own: Tensor, q: Tensor, cells: Cells, sizes: Tensor | None = None) -> Tensor:
    """Average tokens (B, M, T, D) by q (B, M, T, K) and, where given, by their sizes (B, M, T): (B, M, D)."""
    weight = q if sizes is None else q * sizes[..., None]
    total = cells.fold(weight.sum(2)[..., None])
    return cells.fold(weight.mT.to(own.dtype) @ own) / (total + 1e-12).to(own.dtype)


def upsample(s: Tensor, q: Tensor, cells: Cells) -> Tensor:
    """Give each token its mixture of super tokens (B, M, D): (B, N, D)."""
    return cells.put(q.to(s.dtype) @ cells.unfold(s))


def mass_of(q: Tensor, cells: Cells) -> Tensor:
    """Write Q^T out, (B, M, N): what of each token every super token stands for."""
    count, room = cells.tokens.shape[1:]
    slot = cells.slot.clamp_min(0)
    rows = _rows(q.flatten(1, 2), slot) * (cells.slot >= 0)[..., None]  # (B, N, K)
    around = cells.neighbours.masked_fill(cells.neighbours < 0, count)[slot // room]  # (b, N, K)
    full = q.new_zeros(*rows.shape[:2], count + 1)
    return full.scatter_add_(-1, around.expand_as(rows), rows)[..., :count].mT
