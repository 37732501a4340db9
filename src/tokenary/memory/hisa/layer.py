"""One layer: index keys beside the keys of the cache, and attention to the tokens that the search finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenary.hf.cache import TokenLayer
from tokenary.hf.rotation import Rotation
from tokenary.memory.hisa.blocks import BlockIndex, Branches
from tokenary.memory.hisa.indexer import LightningIndexer
from tokenary.memory.hisa.plan import Plan
from tokenary.memory.hisa.search import search
from tokenary.memory.read_base import PartialLayer, Seen, attend_to, in_prompt

if TYPE_CHECKING:
    from tokenary.memory.hisa import HISA


class HisaLayer(PartialLayer):
    """The indices of every sequence of a batch.

    An index holds committed tokens. It catches up with the cache at the next pass that reads from it, so that a
    rejected draft never was in it. The tokens of a pass are searched as well: those of a chain lie in the index for the
    length of the search, those of a tree beside it.

    Parameters
    ----------
    policy : HISA
        How much is read, and whether of the prompt too.
    indexer : LightningIndexer
        Of this layer.
    rotation : Rotation
        Of the model.
    plan : Plan
        How to search.
    """

    policy: HISA

    def __init__(self, policy: HISA, indexer: LightningIndexer, rotation: Rotation, plan: Plan) -> None:
        super().__init__(policy)
        self.indexer, self.rotation, self.plan = indexer, rotation, plan
        self._indices: list[BlockIndex] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the index keys and of the means of blocks."""
        return sum(index.nbytes for index in self._indices)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these sequences; a sequence that is repeated gets an index of its own, made anew from the cache."""
        old, taken = self._indices, set[int]()
        self._indices = []
        for row in rows:
            index = old[row] if row < len(old) and row not in taken else self._empty(None)
            self._indices.append(index)
            taken.add(row)

    def join(self, other: HisaLayer, rows: int) -> None:
        """Append the indices of the sequences of another one behind those of ours."""
        self._indices += [self._empty(None) for _ in range(rows - len(self._indices))]
        self._indices += other._indices

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend to the tokens found; the ordinary way where everything is read."""
        if in_prompt(layer) and self.policy.prefill == "dense":
            return None
        batch, _, width, _ = query.shape
        sees = _sees(layer, mask, batch, width, key.device)
        places = torch.as_tensor(layer.held, device=key.device)[:, None] + sees.sum(-1) - 1
        count = self.policy.count(places + 1)
        if bool((count > places).all()):
            return None
        slots, real = self.find(layer, query, key, sees, places, count)
        return attend_to(query, key, value, slots, real, scale)

    def choose(self, layer: TokenLayer, query: Tensor, key: Tensor, seen: Seen, count: Tensor) -> Tensor:
        """Choose what is read, for all heads alike: (B, 1, W, N) bool; `attend` does without such a table."""
        slots, real = self.find(layer, query, key, seen.slots[:, :, layer.fill :], seen.total - 1, count)
        chosen = torch.zeros(*slots.shape[:3], key.shape[2] + 1, dtype=torch.bool, device=key.device)
        return chosen.scatter_(-1, torch.where(real, slots, key.shape[2]), True)[..., :-1]

    def find(
        self, layer: TokenLayer, query: Tensor, key: Tensor, sees: Tensor, places: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Find the slots that the tokens of a pass read.

        Parameters
        ----------
        layer : TokenLayer
            The cache.
        query, key : Tensor
            (B, Hq, W, D) and (B, Hkv, N, D), rotated.
        sees : Tensor
            Which of the new tokens each of them sees, itself included, (B, W, W) bool.
        places, count : Tensor
            Their positions, and how many tokens each reads, (B, W) int64.

        Returns
        -------
        Tensor, Tensor
            Slots (B, 1, W, K) int64, and which are real, (B, 1, W, K) bool.
        """
        found = [
            self._find(layer, row, query[row], key[row], sees[row], places[row], count[row])
            for row in range(len(layer.held))
        ]
        most = max(slots.shape[1] for slots, _ in found)
        padded = [[pad(side, (0, most - side.shape[1])) for side in lists] for lists in found]
        slots, real = (torch.stack(sides)[:, None] for sides in zip(*padded, strict=True))
        return slots, real

    def _find(
        self, layer: TokenLayer, row: int, query: Tensor, key: Tensor, sees: Tensor, places: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Find the slots that one sequence's new tokens read: (W, K) int64, and which are real, (W, K) bool."""
        index, width = self._caught_up(layer, row, key), len(places)
        tree = layer.shared[0].ancestors is not None
        new = torch.arange(width, device=key.device)
        if layer.valid is not None and not tree:
            new = layer.valid[row].nonzero()[:, 0]
        own_keys, size = self._index_keys(key[:, layer.fill + new], places[new]), index.size
        queries, weights = self.indexer.queries(self.rotation(query[:, new].float(), -places[new]), places[new])
        if tree:
            branches = Branches(own_keys, sees, places)
            found, real = search(queries, weights, places, count, index, self.plan, branches)
        else:
            index.append(own_keys)
            found, real = search(queries, weights, places[new], count[new], index, self.plan)
            index.cut(size)
        slots = layer.fill + new[(found - size).clamp(min=0)]
        slots = torch.where(found < size, found, slots)
        if len(new) == width:
            return slots, real
        whole = layer.fill + torch.arange(width, device=key.device)[:, None].repeat(1, slots.shape[1])
        is_real = torch.zeros_like(whole, dtype=torch.bool)
        is_real[:, 0] = True  # padding reads itself
        whole[new], is_real[new] = slots, real
        return whole, is_real

    def _caught_up(self, layer: TokenLayer, row: int, key: Tensor) -> BlockIndex:
        """Return a sequence's index, with all that is committed in it."""
        while len(self._indices) < len(layer.held):
            self._indices.append(self._empty(key.device))
        index = self._indices[row]
        start, end = index.size, layer.held[row]
        if start < end:
            index.append(self._index_keys(key[:, start:end], torch.arange(start, end, device=key.device)))
        return index

    def _index_keys(self, key: Tensor, places: Tensor) -> Tensor:
        """Project keys (Hkv, N, D) of tokens at `places` (N,): (N, d)."""
        return self.indexer.keys(self.rotation(key.float(), -places), places)

    def _empty(self, device: torch.device | None) -> BlockIndex:
        made = self.indexer.query.weight.device if device is None else device
        return BlockIndex(self.plan.block, self.indexer.width, made)


def _sees(layer: TokenLayer, mask: Tensor | None, batch: int, width: int, device: torch.device) -> Tensor:
    """Which new tokens each new token sees, itself included: (B, W, W) bool."""
    if mask is None:
        return torch.ones(batch, width, width, dtype=torch.bool, device=device).tril()
    return (mask[:, 0, :width, layer.fill :] == 0).expand(batch, -1, -1)
