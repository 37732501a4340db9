"""Tokens that were stored together, and attention to such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenary.memory.zipcache.packing import pack, unpack
from tokenary.memory.zipcache.quantizers import SCHEMES, Quantized, Scheme, gather_tokens


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values of tokens that were stored together.

    Parameters
    ----------
    shape : tuple of int
        (Hkv, N, D).
    dtype : torch.dtype
        What the model works in.
    salient : Tensor or None
        Which tokens are in the first set, (Hkv, N) packed a bit each; None where there is only one.
    keys, values : Quantized
        In storage order.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    salient: Tensor | None
    keys: Quantized
    values: Quantized

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, salient: Tensor, bits: tuple[int, int], schemes: tuple[Scheme, Scheme]
    ) -> Segment:
        """Quantize keys and values (Hkv, N, D).

        Parameters
        ----------
        keys, values : Tensor
            In the order of the tokens.
        salient : Tensor
            (Hkv, N) bool, as many in every head.
        bits : tuple of int
            Of salient tokens, and of the others.
        schemes : tuple of str
            Of keys, and of values.
        """
        heads, count, size = keys.shape
        sets = [(order, width) for order, width in zip(_orders(salient), bits, strict=True) if order.shape[1]]
        orders, widths = zip(*sets, strict=True)
        mask = pack(salient.to(torch.uint8), 1) if len(sets) == 2 else None
        stored = (
            SCHEMES[scheme].of(x, orders, widths, scheme == "separable")
            for x, scheme in zip((keys, values), schemes, strict=True)
        )
        return cls((heads, count, size), keys.dtype, mask, *stored)

    @property
    def orders(self) -> tuple[Tensor, ...]:
        """Which tokens each set holds, (Hkv, n)."""
        heads, count, _ = self.shape
        if self.salient is None:
            return (torch.arange(count, device=self.keys.low.device).expand(heads, -1),)
        return _orders(unpack(self.salient, 1, count).bool())

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values, (Hkv, N, D), in the order of the tokens."""
        orders = self.orders
        back = torch.cat(orders, dim=1).argsort(-1)
        keys, values = (gather_tokens(part.restored(orders, self.dtype), back) for part in (self.keys, self.values))
        return keys, values

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        return [*([] if self.salient is None else [self.salient]), *self.keys.tensors(), *self.values.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def numbers(self) -> int:
        """How many keys' and values' numbers they stand for."""
        heads, count, size = self.shape
        return 2 * heads * count * size


def _orders(salient: Tensor) -> tuple[Tensor, ...]:
    return tuple(chosen.nonzero()[:, 1].view(len(salient), -1) for chosen in (salient, ~salient))


def attend(
    segments: Sequence[Segment],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend to segments as they are stored, and to open keys and values; see `LayerStore.attend`.

    Attention does not ask in which order tokens lie, so none is put back into its place.
    """
    orders = [segment.orders for segment in segments]
    parts = [segment.keys.dot(query, order) for segment, order in zip(segments, orders, strict=True)]
    logits = torch.cat([*parts, query @ keys.mT], dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if mask is not None:
        logits[..., logits.shape[-1] - keys.shape[1] :] += mask
    weights = logits.softmax(-1).to(values.dtype)
    *stored, newest = weights.split([*(segment.shape[1] for segment in segments), keys.shape[1]], dim=-1)
    output = newest @ values
    for segment, order, part in zip(segments, orders, stored, strict=True):
        output = output + segment.values.mix(part, order)
    return output
