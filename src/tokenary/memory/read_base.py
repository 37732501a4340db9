"""What read policies share: how much a query reads, which slots it may read, and attention to those it reads.

A token has a *slot*, where it lies in the cache, and for each query a *rank*, its place among the tokens that the query
may see. Ranks, unlike slots, depend neither on the neighbours in a batch nor on the drafts of a pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tokenary.core.budget import Budget
from tokenary.core.errors import OptionError
from tokenary.hf.cache import TokenLayer
from tokenary.memory.base import ReadLayer, ReadPolicy

BLOCK = 16  # queries whose keys and values are gathered at once


class PartialRead(ReadPolicy):
    """A read policy with a budget of tokens a query.

    Parameters
    ----------
    read : Budget
        Tokens that the method chooses for a query, the newest token included; a share is of what the query may see.

    Raises
    ------
    OptionError
        If the budget is given in bytes.
    """

    toy_options: ClassVar[Mapping[str, Any]] = {"read": 8}

    def __init__(self, read: Budget) -> None:
        if read.bytes is not None:
            raise OptionError("read", read, "a share (25%) or a number of tokens (256)")
        self.read = read

    def count(self, seen: Tensor) -> Tensor:
        """Return how many of `seen` tokens are chosen, int64 of the same shape."""
        if self.read.tokens is not None:
            return torch.full_like(seen, self.read.tokens).minimum(seen)
        assert self.read.ratio is not None
        return (seen * self.read.ratio + 1e-9).long().clamp(min=1).minimum(seen)

    def most(self, seen: Tensor) -> Tensor:
        """Return how many of `seen` tokens a query reads at most: the chosen ones and those that it always reads."""
        return self.count(seen)

    @abstractmethod
    def layer(self, index: int) -> PartialLayer | None:
        """Return fresh state for one layer; None for a layer that reads everything."""

    def attach(self, config: PretrainedConfig) -> list[ReadLayer | None]:
        """Return fresh state for every layer of a model, with nothing left of earlier sequences."""
        states = super().attach(config)
        for index, state in enumerate(states):
            if isinstance(state, PartialLayer):
                state.index = index
        return states


class PartialLayer(ReadLayer):
    """Reads, for every new token behind the prompt, the tokens that `choose` names; the prompt itself reads all."""

    index: int

    def __init__(self, policy: PartialRead) -> None:
        self.policy = policy

    @abstractmethod
    def choose(self, layer: TokenLayer, query: Tensor, key: Tensor, seen: Seen, count: Tensor) -> Tensor:
        """Choose what is read.

        Parameters
        ----------
        layer : TokenLayer
            The cache.
        query, key : Tensor
            (B, Hq, W, D) and (B, Hkv, N, D), rotated.
        seen : Seen
            What each query may see.
        count : Tensor
            How many tokens each query reads, (B, W) int64.

        Returns
        -------
        Tensor
            (B, L, W, N) bool, a set for each query head (L = Hq), for each key head (Hkv) or one for all (1).
        """

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attend to what was chosen; the ordinary way in the prompt, and where everything is read."""
        if in_prompt(layer):
            return None
        seen = Seen.of(mask, query.shape[2], key)
        count = self.policy.count(seen.total)
        if bool((count >= seen.total).all()):
            return None
        slots, real = listed(self.choose(layer, query, key, seen, count))
        return attend_to(query, key, value, slots, real, scale)


@dataclass(frozen=True)
class Seen:
    """What each new token may look at.

    Parameters
    ----------
    slots : Tensor
        (B, W, N) bool.
    ranks : Tensor
        Place of each visible slot among those that the query sees, (B, W, N) int64; anything elsewhere.
    total : Tensor
        How many it sees, itself included, (B, W) int64.
    """

    slots: Tensor
    ranks: Tensor
    total: Tensor

    @classmethod
    def of(cls, mask: Tensor | None, width: int, key: Tensor) -> Seen:
        """Read it off the mask of a pass; see `tokenary.hf.cache.LayerReader.attend`."""
        batch, n_slots = key.shape[0], key.shape[2]
        if mask is None:
            every = torch.arange(n_slots, device=key.device).expand(batch, width, -1)
            return cls(torch.ones_like(every, dtype=torch.bool), every, torch.full_like(every[..., 0], n_slots))
        slots = (mask[:, 0, :width] == 0).expand(batch, -1, -1)
        counted = slots.cumsum(-1)
        return cls(slots, counted - 1, counted[..., -1])


def in_prompt(layer: TokenLayer) -> bool:
    """Whether the pass under way reads a piece of a prompt."""
    return layer.shared[0].prompt or layer.fill == 0


def highest(scores: Tensor, count: Tensor) -> Tensor:
    """Choose the `count` highest scores of every row, the earlier ones of equal scores.

    Parameters
    ----------
    scores : Tensor
        (..., N); -inf is never chosen.
    count : Tensor
        (...) int64, one number a row.

    Returns
    -------
    Tensor
        (..., N) bool.
    """
    most = min(int(count.max()), scores.shape[-1])
    if most < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    top = scores.topk(most).values
    least = top.gather(-1, (count - 1).clamp(0, most - 1)[..., None]).clamp(min=torch.finfo(scores.dtype).min)
    chosen = scores >= least
    if bool((chosen.sum(-1) > count).any()):
        above, equal = scores > least, scores == least
        left = count[..., None] - above.sum(-1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(-1) <= left))
    return chosen


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Turn sets into lists: slots (..., M) int64 ascending, and which of them are real (..., M) bool."""
    flat = chosen.reshape(-1, chosen.shape[-1])
    sizes = flat.sum(-1)
    real = torch.arange(int(sizes.max()), device=chosen.device) < sizes[:, None]
    slots = torch.zeros(real.shape, dtype=torch.long, device=chosen.device)
    slots[real] = flat.nonzero()[:, 1]  # both run row by row
    shape = (*chosen.shape[:-1], real.shape[-1])
    return slots.view(shape), real.view(shape)


def attend_to(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    real: Tensor,
    scale: float,
    turn: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attend to listed slots, gathered.

    Parameters
    ----------
    query, key, value : Tensor
        (B, Hq, W, D), (B, Hkv, N, D) and (B, Hkv, N, Dv).
    slots, real : Tensor
        (B, L, W, M) int64 and bool from `listed`; L is Hq, Hkv or 1.
    scale : float
        Factor on the logits.
    turn : callable, optional
        Applied to gathered keys (B, L, W, M, D): rotates them by their place in the list.

    Returns
    -------
    Tensor
        (B, W, Hq, Dv).
    """
    batch, heads, width, size = query.shape
    lists = max(slots.shape[1], key.shape[1])
    queries = query.view(batch, lists, -1, width, size).transpose(2, 3)  # (B, L, W, R, D), R heads a list
    output = []
    for start in range(0, width, BLOCK):
        part = slice(start, start + BLOCK)
        keys, values = (_gathered(states, slots[:, :, part]) for states in (key, value))  # (B, L, W, M, D)
        if turn is not None:
            keys = turn(keys)
        logits = torch.matmul(queries[:, :, part], keys.transpose(-1, -2)).float() * scale  # (B, L, W, R, M)
        weights = logits.masked_fill_(~real[:, :, part, None], float("-inf")).softmax(-1)
        output.append(torch.matmul(weights.to(values.dtype), values))
    joined = torch.cat(output, dim=2)  # (B, L, W, R, Dv)
    return joined.permute(0, 2, 1, 3, 4).reshape(batch, width, heads, -1)


def _gathered(states: Tensor, slots: Tensor) -> Tensor:
    """Gather slots (B, L, W, M) of keys or values (B, Hkv, N, D): (B, L, W, M, D), with Hkv lists for a shared one."""
    batch, lists, width, _ = slots.shape
    kv_heads = states.shape[1]
    if lists == 1:  # whole tokens, which is quicker
        rows = [states[row].index_select(1, slots[row, 0].flatten()) for row in range(batch)]
        return torch.stack(rows).view(batch, kv_heads, width, -1, states.shape[-1])
    rows_of = torch.arange(batch, device=states.device)[:, None, None, None]
    heads_of = (torch.arange(lists, device=states.device) // (lists // kv_heads))[:, None, None]
    return states[rows_of, heads_of, slots]
