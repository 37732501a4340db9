"""Keys or values of some tokens as packed integers, and products with them that never restore them.

x' = low + step * code. What shares low and step decides the error, and what they cost:

    channel     each channel, in each set on its own: keys have channels of large numbers
    token       each token, over all heads
    separable   each token too, but every channel was divided by ``sqrt(max |x|)`` first: as few numbers, and channels
                of large numbers spoil the others less
    group       `GROUP` channels of one head of one token: the most accurate, and the dearest

Tokens lie in storage order, set after set, for each key head on its own. A set has bits of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from tokenary.memory.zipcache.packing import WHOLE, Codes, limits, step_of

GROUP = 32

Scheme = Literal["channel", "separable", "token", "group"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """Keys or values of N tokens.

    Parameters
    ----------
    sets : tuple of Codes
        (Hkv, n, D) each.
    low, span : Tensor
        Offsets and ranges, float16; of which shape, the scheme knows.
    channel : Tensor or None
        A factor for each channel, (Hkv, 1, D) float16.
    """

    sets: tuple[Codes, ...]
    low: Tensor
    span: Tensor
    channel: Tensor | None

    @classmethod
    def of(cls, x: Tensor, orders: Sequence[Tensor], bits: Sequence[int], separable: bool = False) -> Self:
        """Quantize (Hkv, N, D), in the order of the tokens; `orders` (Hkv, n) are those of each set."""
        channel = None
        even = x.float()
        if separable:
            channel = even.abs().amax(1, keepdim=True).sqrt().half()
            channel = torch.where(channel == 0, torch.ones_like(channel), channel)  # a channel of zeros
            even = even / channel.float()
        made = cls((), *cls._limits(even, orders), channel)
        sets = []
        for at, (order, width) in enumerate(zip(orders, bits, strict=True)):
            low, span = (cls._of_set(scales, at, order, x.shape[-1]) for scales in (made.low, made.span))
            part = gather_tokens(x if width == WHOLE else even, order)
            sets.append(Codes.of(part, low, step_of(span, width), width))
        return replace(made, sets=tuple(sets))

    @staticmethod
    @abstractmethod
    def _limits(x: Tensor, orders: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Offsets and ranges of (Hkv, N, D)."""

    @staticmethod
    @abstractmethod
    def _of_set(scales: Tensor, at: int, order: Tensor, size: int) -> Tensor:
        """Those of the tokens `order` of one set, to be broadcast to (Hkv, n, D of that size)."""

    def _scaled_sets(self, orders: Sequence[Tensor]) -> Iterator[tuple[Codes, Tensor, Tensor]]:
        """For each set: codes, offsets and steps, float32."""
        for at, (codes, order) in enumerate(zip(self.sets, orders, strict=True)):
            low, span = (self._of_set(scales, at, order, codes.size) for scales in (self.low, self.span))
            yield codes, low.float(), step_of(span, codes.bits)

    def restored(self, orders: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the numbers, (Hkv, N, D), in storage order; `orders` (Hkv, n) say which tokens each set holds."""
        found = []
        for codes, low, step in self._scaled_sets(orders):
            if codes.bits == WHOLE:
                found.append(codes.numbers(dtype))
                continue
            numbers = torch.addcmul(low, codes.numbers(torch.float32), step)
            found.append((numbers if self.channel is None else numbers * self.channel.float()).to(dtype))
        return torch.cat(found, dim=1)

    def dot(self, query: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """Return the products of queries (Hkv, R, D) with the tokens, (Hkv, R, N)."""
        return query @ self.restored(orders, query.dtype).mT

    def mix(self, weights: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """Return sums of the tokens weighted by (Hkv, R, N): (Hkv, R, D)."""
        return weights @ self.restored(orders, weights.dtype)

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        scales = [self.low, self.span, *([] if self.channel is None else [self.channel])]
        return [*(codes.data for codes in self.sets), *scales]


class ByChannel(Quantized):
    """Offset and range of each channel of each set, (sets, Hkv, 1, D)."""

    @staticmethod
    def _limits(x: Tensor, orders: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        low, span = zip(*(limits(gather_tokens(x, order), 1) for order in orders), strict=True)
        return torch.stack(low), torch.stack(span)

    @staticmethod
    def _of_set(scales: Tensor, at: int, order: Tensor, size: int) -> Tensor:
        return scales[at]

    def dot(self, query: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """Scale the queries instead of the keys: q k' = (q step) code + q low."""
        found = []
        exact = query.to(torch.promote_types(query.dtype, torch.float32))
        for codes, low, step in self._scaled_sets(orders):
            numbers = codes.numbers(query.dtype)
            if codes.bits == WHOLE:
                found.append(query @ numbers.mT)
            else:
                offset = (exact * low).sum(-1, keepdim=True).to(query.dtype)
                found.append((exact * step).to(query.dtype) @ numbers.mT + offset)
        return torch.cat(found, dim=-1)


class ByToken(Quantized):
    """Offset and range of each token, (N) in the order of the tokens."""

    @staticmethod
    def _limits(x: Tensor, orders: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return limits(x, (0, 2), keepdim=False)

    @staticmethod
    def _of_set(scales: Tensor, at: int, order: Tensor, size: int) -> Tensor:
        return scales[order][..., None]

    def mix(self, weights: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """Scale the weights instead of the values: sum p v' = c (sum (p step) code + sum p low)."""
        wide = torch.promote_types(weights.dtype, torch.float32)
        total = weights.new_zeros(*weights.shape[:2], self.sets[0].size, dtype=wide)
        parts = weights.split([order.shape[1] for order in orders], dim=-1)
        for part, (codes, low, step) in zip(parts, self._scaled_sets(orders), strict=True):
            numbers = codes.numbers(weights.dtype)
            if codes.bits == WHOLE:
                total += part @ numbers
                continue
            exact = part.to(wide)
            mixed = (exact * step.mT).to(part.dtype) @ numbers + (exact * low.mT).sum(-1, keepdim=True)
            total += mixed if self.channel is None else mixed * self.channel.float()
        return total.to(weights.dtype)


class ByGroup(Quantized):
    """Offset and range of each group of channels of a head of a token, (Hkv, N, groups) in the order of the tokens."""

    @staticmethod
    def _limits(x: Tensor, orders: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        # The last group may be smaller; its channels beyond the width repeat one of its own.
        groups = -(-x.shape[-1] // GROUP)
        index = torch.arange(groups * GROUP, device=x.device).clamp(max=x.shape[-1] - 1)
        return limits(x.index_select(-1, index).unflatten(-1, (groups, GROUP)), -1, keepdim=False)

    @staticmethod
    def _of_set(scales: Tensor, at: int, order: Tensor, size: int) -> Tensor:
        return gather_tokens(scales, order).repeat_interleave(GROUP, dim=-1)[..., :size]


SCHEMES: dict[Scheme, type[Quantized]] = {
    "channel": ByChannel,
    "separable": ByToken,
    "token": ByToken,
    "group": ByGroup,
}


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Return the tokens `order` (Hkv, n) of each head of (Hkv, N, D)."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.reshape(-1, x.shape[-1]).index_select(0, (order + first).flatten()).view(*order.shape, x.shape[-1])
