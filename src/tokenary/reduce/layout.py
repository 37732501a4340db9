"""From pictures that were seen to the sequence that a language model reads: what stands where, and who for whom."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenary.core.token_map import TokenMap
from tokenary.reduce.base import Context
from tokenary.reduce.mix import Mix, anchors_of


@dataclass(frozen=True)
class Seen:
    """Pictures as the encoder and projector leave them.

    Attributes
    ----------
    tokens : (B, N, D) Tensor
        View after view; fewer than there are patches where the encoder itself was reduced.
    numbers : (B, N) Tensor
        The patch that each stands at, counted view after view.
    context : Context
        What is known of them.
    total : int
        Patches of all views.
    vision : tuple of TokenMap
        The maps inside the encoder, one a view in their batch; empty where it ran on everything.
    there : (B, N) bool Tensor or None
        Which of the tokens are tokens at all; None for all.
    """

    tokens: Tensor
    numbers: Tensor
    context: Context
    total: int
    vision: tuple[TokenMap, ...] = ()
    there: Tensor | None = None

    def __getitem__(self, rows: slice | list[int]) -> Seen:
        """Some of the pictures."""
        context = self.context
        index = list(range(len(self.tokens)))[rows] if isinstance(rows, slice) else rows
        views = torch.tensor([row * context.views + view for row in index for view in range(context.views)])

        def batch(states: Any) -> Any:
            return {layer: each[views.to(each.device)] for layer, each in states.items()}

        def rowed(states: Tensor | None, dims: int) -> Tensor | None:
            return states[index] if states is not None and states.ndim == dims else states

        context = replace(
            context,
            queries=batch(context.queries),
            keys=batch(context.keys),
            values=batch(context.values),
            recorded_sizes=batch(context.recorded_sizes),
            place=rowed(context.place, 3),
            sizes=rowed(context.sizes, 2),
            valid=rowed(context.valid, 2),
            samples=None if context.samples is None else tuple(context.samples[row] for row in index),
        )
        vision = tuple(each[views.to(each.device)] if each.batch_shape else each for each in self.vision)
        return Seen(self.tokens[index], self.numbers[index], context, self.total, vision, rowed(self.there, 2))


@dataclass(frozen=True)
class Prompt:
    """What the language model reads: ``<bos>``, image tokens (newlines among them), the question.

    Attributes
    ----------
    embeds : (B, S, D) Tensor
    positions : (B, S) Tensor
    mask : (B, S) bool Tensor or None
        False at padding; None where there is none and positions are without gaps.
    bias : (B, S) Tensor or None
        Logarithms of sizes, where the language model is to weigh tokens by them.
    image : int
        How many of the tokens, behind the first, are of the image.
    context : Context or None
        What is known of the image tokens, for a reducer between layers.
    """

    embeds: Tensor
    positions: Tensor
    mask: Tensor | None
    bias: Tensor | None
    image: int
    context: Context | None


@dataclass(frozen=True)
class Laid:
    """Image tokens in the order in which they are read.

    Attributes
    ----------
    tokens : (B, M, D) Tensor
    numbers : (B, M) Tensor
        The place of each in the full sequence of image tokens.
    there : (B, M) bool Tensor or None
        Which of them are tokens at all; None for all.
    sizes : (B, M) Tensor or None
        How many patches each stands for.
    total : int
        Length of the full sequence.
    """

    tokens: Tensor
    numbers: Tensor
    there: Tensor | None
    sizes: Tensor | None
    total: int

    def followed(self, chosen: TokenMap, grouped: bool) -> Laid:
        """Return what a map (B, M, N) makes of them."""
        batch, n = self.tokens.shape[:2]
        there = chosen.mask(torch.ones(n, dtype=torch.bool, device=self.tokens.device)).expand(batch, -1)
        return Laid(
            chosen.apply(self.tokens),
            self.numbers.gather(1, anchors_of(chosen).expand(batch, -1)),
            None if bool(there.all()) else there,
            chosen.sizes(self.sizes).expand(batch, -1) if grouped else None,
            self.total,
        )


def joined(
    laid: Laid, place: Tensor, grid: tuple[int, int], crops: tuple[int, int], newline: Tensor
) -> tuple[Laid, Tensor]:
    """Lay a thumbnail and crops out: the thumbnail, then the rows of the large grid, a newline behind each.

    Parameters
    ----------
    laid : Laid
        Numbered view after view.
    place : (B, M, 3) Tensor
        View, row and column of each.
    grid, crops : (int, int)
        Rows and columns of patches of a view, and of crops.
    newline : (D,) Tensor
        What ends a row.

    Returns
    -------
    Laid, and the places of its tokens with -1 for newlines
    """
    (rows, columns), (down, across) = grid, crops
    tokens, device, batch = laid.tokens, laid.tokens.device, len(laid.tokens)
    view, row, column = place.unbind(-1)
    crop, wide = (view - 1).clamp_min(0), across * columns + 1
    row, column = crop // across * rows + row, crop % across * columns + column
    at = torch.where(view == 0, laid.numbers, rows * columns + row * wide + column)
    lines = rows * columns + torch.arange(1, down * rows + 1, device=device) * wide - 1
    count, total = len(lines), rows * columns + down * rows * wide
    there = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device) if laid.there is None else laid.there
    there = torch.cat([there, there.new_ones(batch, count)], dim=1)
    at = torch.cat([at, lines.expand(batch, -1)], dim=1)
    order = at.masked_fill(~there, total).argsort(dim=1, stable=True)
    wanted = order[..., None]
    tokens = torch.cat([tokens, newline.to(tokens.dtype).expand(batch, count, -1)], dim=1)
    place = torch.cat([place, place.new_full((batch, count, 3), -1)], dim=1)
    sizes = laid.sizes
    if sizes is not None:
        sizes = torch.cat([sizes, sizes.new_ones(batch, count)], dim=1).gather(1, order)
    made = Laid(
        tokens.gather(1, wanted.expand(-1, -1, tokens.shape[-1])),
        at.gather(1, order),
        None if laid.there is None else there.gather(1, order),
        sizes,
        total,
    )
    return made, place.gather(1, wanted.expand(-1, -1, 3))


def patch_owners(seen: Seen, chosen: TokenMap | None) -> Tensor:
    """Return the token that stands for each patch of all views, (B, N); -1 where none does."""
    batch, views = len(seen.tokens), seen.context.views
    found = torch.arange(seen.total // views, device=seen.tokens.device).expand(batch * views, -1)
    for each in seen.vision:
        found = followed(found, each)
    found = found.unflatten(0, (batch, views))
    shift = torch.arange(views, device=found.device)[:, None] * (seen.tokens.shape[1] // views)
    found = torch.where(found < 0, -1, found + shift).flatten(1)
    return found if chosen is None else followed(found, chosen)


def followed(owner: Tensor, chosen: TokenMap) -> Tensor:
    """Follow tokens ``owner`` (B, N), -1 for none, through a map to the outputs that stand for them."""
    share = chosen.mass if isinstance(chosen, Mix) else chosen.dense().abs()
    share = share.expand(len(owner), -1, -1)
    if not share.shape[1]:
        return torch.full_like(owner, -1)
    most, output = share.max(1)
    stands = torch.where(most > 0, output, -1)
    return torch.where(owner < 0, -1, stands.gather(1, owner.clamp_min(0)))
