"""Index keys of a text in blocks, each block with the mean of its keys once it is full."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class BlockIndex:
    """Index keys of one sequence, in the order of its tokens, and the means of its closed blocks.

    Parameters
    ----------
    block : int
        Tokens a block.
    width : int
        Of a key.

    Attributes
    ----------
    size : int
        Tokens held.
    """

    def __init__(self, block: int, width: int, device: torch.device | str = "cpu") -> None:
        self.block, self.size = block, 0
        self._keys = torch.zeros(1, block, width, device=device)  # (blocks, B, d)
        self._means = torch.zeros(1, width, device=device)  # (blocks, d)

    def append(self, keys: Tensor) -> None:
        """Take the keys (N, d) of the next tokens, and the means of the blocks that they close."""
        before, self.size = self.size, self.size + len(keys)
        needed = -(-self.size // self.block)
        if needed > len(self._keys):
            room = needed + needed // 8
            self._keys, self._means = (
                torch.cat([old, old.new_zeros(room - len(old), *old.shape[1:])]) for old in (self._keys, self._means)
            )
        self.keys[before:] = keys
        closing = slice(before // self.block, self.closed)
        self._means[closing] = self._keys[closing].mean(1)

    def cut(self, size: int) -> None:
        """Forget all but the first `size` tokens."""
        self.size = size

    @property
    def closed(self) -> int:
        """Blocks that are full."""
        return self.size // self.block

    @property
    def keys(self) -> Tensor:
        """Keys of all tokens, (N, d)."""
        return self._keys.flatten(0, 1)[: self.size]

    @property
    def means(self) -> Tensor:
        """Mean keys of the closed blocks, (M, d)."""
        return self._means[: self.closed]

    def of_blocks(self, numbers: Tensor) -> Tensor:
        """Gather the keys of blocks (Q, C): (Q, C * B, d); anything where a block has no token."""
        flat = numbers.clamp(max=len(self._keys) - 1).flatten()
        return self._keys.flatten(1).index_select(0, flat).view(len(numbers), -1, self._keys.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes held, free room included."""
        return self._keys.nbytes + self._means.nbytes


@dataclass(frozen=True)
class Branches:
    """New tokens that lie in a tree behind the tokens of an index; each is a query too.

    Parameters
    ----------
    keys : Tensor
        Index keys, (W, d).
    sees : Tensor
        Ancestors of each, itself included, (W, W) bool.
    places : Tensor
        Positions, (W,) int64.
    """

    keys: Tensor
    sees: Tensor
    places: Tensor

    def closed_blocks(self, index: BlockIndex) -> list[tuple[int, int, Tensor]]:
        """Return, of each token that ends a block: which it is, the block's number, and the mean of its keys (1, d)."""
        found = []
        for node in ((self.places + 1) % index.block == 0).nonzero()[:, 0].tolist():
            number = int(self.places[node]) // index.block
            keys = torch.cat([index.keys[number * index.block :], self.keys[self.sees[node]]])[-index.block :]
            found.append((node, number, keys.mean(0, keepdim=True)))
        return found
