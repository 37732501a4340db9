"""Attention among super tokens: as a module, and around the attention of a plain ViT."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.models.bench_vlm.model import Attention
from tokenary.reduce.encoder import Encoder
from tokenary.reduce.super_token.association import Borders, Cells, associate, own_cell, super_tokens, upsample

#: How tokens belong to cells: by likeness, or each to its own cell (pooling attention, a control).
Association = Literal["soft", "hard"]
#: From tokens (B, N, D) in cells to Q (B, M, T, K).
Associate = Callable[[Tensor, Cells], Tensor]


class SuperTokenAttention(nn.Module):
    """Multi-head attention among super tokens, whose result every token gets back in its parts.

    Parameters
    ----------
    width, heads : int
    cell : (int, int)
        Rows and columns of a cell; (1, 1) is plain attention.
    rounds : int
        Of the association.
    borders : {"mask", "zero"}
        See `associate`; ``zero`` is what the authors' code does.
    """

    def __init__(
        self, width: int, heads: int, cell: tuple[int, int] = (8, 8), rounds: int = 1, borders: Borders = "mask"
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.cell, self.rounds, self.borders = cell, rounds, borders

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend: tokens (B, rows columns, D), already normalised, to the same shape."""
        if self.cell == (1, 1):
            return self.attention(x)
        cells = Cells.of_grid(grid, self.cell, x.device)
        q = associate(x, cells, self.rounds, borders=self.borders)
        return upsample(self.attention(super_tokens(cells.take(x), q, cells)), q, cells)


@contextlib.contextmanager
def among_super_tokens(
    encoder: nn.Module,
    layers: Mapping[int, tuple[int, int]],
    *,
    association: Association | Associate = "soft",
    rounds: int = 1,
    tau: float = 1.0,
    proportional: bool = True,
) -> Iterator[None]:
    """Let blocks of a plain ViT attend among super tokens, inside a ``with`` block; no weight is changed.

    Behind `norm1` patches become super tokens; these and the tokens of the prefix attend to each other, with the
    block's own weights; then each patch gets its mixture of what came out.

    Parameters
    ----------
    encoder : nn.Module
        With ``blocks`` and ``attention`` in each, see `tokenary.reduce.base`, and a ``grid``.
    layers : mapping of int to (int, int)
        Rows and columns of a cell, by block.
    association : {"soft", "hard"} or callable
        ``hard`` gives each token to its own cell (a control); a callable gets tokens and `Cells` and returns Q.
    rounds, tau
        As of `associate`.
    proportional : bool
        Whether super tokens are weighed by how much they stand for, so that the prefix, which stands for itself, gets
        the part of the attention that it got among all patches.

    Raises
    ------
    OptionError
        If there is no such block, or the model does not say what grid it has.
    UnsupportedModelError
        In a pass, if the tokens are not those of a whole grid.
    """
    net = Encoder.of(encoder)
    if net.grid is None or not all(0 <= layer < len(net.blocks) for layer in layers):
        raise OptionError("layers", sorted(layers), f"blocks 0 to {len(net.blocks) - 1} of a model with a grid")
    if callable(association):
        to_q = association
    elif association == "hard":
        to_q = own_cell
    else:

        def to_q(x: Tensor, cells: Cells) -> Tensor:
            return associate(x, cells, rounds, tau)

    with contextlib.ExitStack() as stack:
        for layer, cell in layers.items():
            around = _Around(net.grid, cell, net.prefix, to_q, proportional)
            attention: Any = net.blocks[layer].attention
            stack.callback(attention.register_forward_pre_hook(around.before).remove)
            stack.callback(attention.register_forward_hook(around.after).remove)
        yield


class _Around:
    """The two hooks around one attention, and the Q that both use."""

    def __init__(
        self, grid: tuple[int, int], cell: tuple[int, int], prefix: int, to_q: Associate, proportional: bool
    ) -> None:
        self.grid, self.cell, self.prefix = grid, cell, prefix
        self.cells = Cells.of_grid(grid, cell)
        self.to_q, self.proportional = to_q, proportional

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Make super tokens of the patches that enter."""
        front, image = args[0][:, : self.prefix], args[0][:, self.prefix :]
        if image.shape[1] != self.grid[0] * self.grid[1]:
            raise UnsupportedModelError(
                f"{image.shape[1]} tokens do not fill a grid of {self.grid[0]} x {self.grid[1]}"
            )
        if self.cells.tokens.device != image.device:
            self.cells = Cells.of_grid(self.grid, self.cell, image.device)
        self.q = self.to_q(image, self.cells)
        few = super_tokens(self.cells.take(image), self.q, self.cells)
        x = torch.cat([front, few], dim=1)
        if not self.proportional:
            return (x,)
        sizes = self.cells.fold(self.q.sum(2)[..., None])[..., 0]  # (B, M)
        return x, torch.cat([sizes.new_ones(len(sizes), self.prefix), sizes.clamp_min(1e-9)], dim=1)

    def after(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        """Give every patch its share of what leaves."""
        front, few = y[:, : self.prefix], y[:, self.prefix :]
        return torch.cat([front, upsample(few, self.q, self.cells)], dim=1)
