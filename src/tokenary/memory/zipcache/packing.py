"""Small integers in bytes, and numbers as small integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_last

#: Bits that mean: as the model made it.
WHOLE = 16
_LARGEST = 65504.0  # of float16, in which offsets and steps are held


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers below ``2 ** bits`` along the last axis.

    A width that does not divide a byte is laid out in parts that do: 3 bits are a part of 2 and a part of 1. In a part
    of w bits, byte j of M holds numbers j, M + j, 2 M + j, ..., the first in its lowest bits.

    Parameters
    ----------
    codes : Tensor
        (..., D) uint8.
    bits : int
        1 to 8.

    Returns
    -------
    Tensor
        uint8, (..., M), M the sum of ``ceil(D w / 8)`` over the parts.
    """
    packed, shift = [], 0
    for width in _parts(bits):
        per_byte = 8 // width
        part = (codes >> shift) & (2**width - 1)
        part = pad_last(part, (0, -part.shape[-1] % per_byte))
        fields = part.unflatten(-1, (per_byte, -1))
        packed.append(sum((fields[..., at, :] << (at * width) for at in range(1, per_byte)), fields[..., 0, :]))
        shift += width
    return torch.cat(packed, dim=-1)


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """Return the integers that `pack` packed, (..., size) uint8."""
    found, start, shift = None, 0, 0
    for width in _parts(bits):
        per_byte, mask = 8 // width, 2**width - 1
        stop = start - (-size // per_byte)
        part = packed[..., start:stop]
        fields = [(part >> (at * width)) & mask for at in range(per_byte)] if width < 8 else [part]
        codes = torch.cat(fields, dim=-1)[..., :size]
        found = codes if found is None else found | (codes << shift)
        start, shift = stop, shift + width
    assert found is not None
    return found


def _parts(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


@dataclass(frozen=True, eq=False)
class Codes:
    """Numbers as packed integers, or, with `WHOLE` bits, as they are.

    Parameters
    ----------
    data : Tensor
        Packed, uint8; or the numbers themselves.
    bits : int
        1 to 8, or `WHOLE`.
    size : int
        Length of the last axis.
    """

    data: Tensor
    bits: int
    size: int

    @classmethod
    def of(cls, x: Tensor, low: Tensor, step: Tensor, bits: int) -> Codes:
        """Round ``(x - low) / step``, x of (..., D), to integers; where the step is 0, x is its offset."""
        if bits == WHOLE:
            return cls(x.clone(), bits, x.shape[-1])
        scaled = (x.float() - low.float()) / step.float().masked_fill(step == 0, 1.0)
        codes = scaled.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        return cls(pack(codes, bits), bits, x.shape[-1])

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """Return the integers, or the numbers themselves, in a floating type, (..., D)."""
        return self.data.to(dtype) if self.bits == WHOLE else unpack(self.data, self.bits, self.size).to(dtype)


def limits(x: Tensor, dims: int | tuple[int, ...], keepdim: bool = True) -> tuple[Tensor, Tensor]:
    """Return least values and ranges over some axes, float16: the offset and the step times ``2 ** bits - 1``."""
    least = x.amin(dims, keepdim=keepdim).clamp(-_LARGEST, _LARGEST).half()
    span = (x.amax(dims, keepdim=keepdim).float() - least.float()).clamp(0, _LARGEST)
    return least, span.half()


def step_of(span: Tensor, bits: int) -> Tensor:
    """Return the step between two codes, float32; 0 for numbers that are not coded."""
    return span.float() / (2**bits - 1) if bits != WHOLE else torch.zeros_like(span, dtype=torch.float32)
