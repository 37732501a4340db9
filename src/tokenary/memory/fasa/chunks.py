"""Frequency chunks: pairs of dimensions, how well each agrees with its whole head, and which ones dominate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenary.core.tree import TokenTree
from tokenary.hf.cache import TokenLayer
from tokenary.hf.rotation import rotated_pairs
from tokenary.hf.target import Target, attached
from tokenary.memory.base import ReadLayer
from tokenary.memory.read_base import Seen, in_prompt

Pairs = Literal["rotation", "adjacent"]

#: Sizes of the top-k sets in which agreement is measured.
BUDGETS = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Agreement:
    """How well chunks agree with their heads.

    Parameters
    ----------
    budgets : tuple of int
        K, sizes of the sets compared.
    mean : Tensor
        Share of a head's top-K tokens that a chunk alone finds, (len(budgets), layers, Hq, P) float32.
    """

    budgets: tuple[int, ...]
    mean: Tensor

    def near(self, read: int | None) -> Tensor:
        """Return the shares (layers, Hq, P) at the budget nearest to `read`; at the largest one without a number."""
        wanted = self.budgets[-1] if read is None else read
        return self.mean[min(range(len(self.budgets)), key=lambda at: abs(self.budgets[at] - wanted))]


def pairs_of(model: PreTrainedModel, pairs: Pairs) -> Tensor:
    """Return the dimensions of each chunk, (P, 2) int64.

    Parameters
    ----------
    model : PreTrainedModel
        With rotary positions.
    pairs : {"rotation", "adjacent"}
        Those that turn together, then any that do not turn; or neighbours, as the authors' code takes them whatever
        the layout.

    Raises
    ------
    UnsupportedModelError
        If the model has no rotary positions.
    """
    text = model.config.get_text_config(decoder=True)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    turning = rotated_pairs(model)
    if pairs == "adjacent":
        return torch.arange(size).view(-1, 2)
    still = sorted(set(range(size)) - set(turning.flatten().tolist()))
    return torch.cat([turning, torch.tensor(still, dtype=torch.long).view(-1, 2)])


def agreements(query: Tensor, key: Tensor, pairs: Tensor, budgets: Sequence[int], seen: Seen) -> Tensor:
    """Measure how much of each head's top tokens every chunk finds by itself.

    Parameters
    ----------
    query, key : Tensor
        Rotated, (B, Hq, W, D) and (B, Hkv, N, D).
    pairs : Tensor
        (P, 2) int64.
    budgets : sequence of int
        K, ascending, at most what the queries see.
    seen : Seen
        What each query may see.

    Returns
    -------
    Tensor
        (len(budgets), B, W, Hq, P) float32.
    """
    length, most, pairs = key.shape[2], budgets[-1], pairs.to(query.device)
    grouped, hidden = query.unflatten(1, (key.shape[1], -1)), ~seen.slots[:, None, None]

    def top(scores: Tensor, hidden: Tensor) -> Tensor:  # (..., K) of the largest K, best first
        return scores.float().masked_fill_(hidden, float("-inf")).topk(most).indices

    parts = grouped[..., pairs].transpose(2, 4)  # (B, Hkv, P, W, G, 2)
    keys = key[..., pairs].permute(0, 1, 3, 4, 2)  # (B, Hkv, P, 2, N)
    alone = torch.matmul(parts.flatten(3, 4), keys).unflatten(3, parts.shape[3:5])
    whole = top(torch.matmul(grouped, key[:, :, None].mT), hidden)
    # a token is in both sets of K where the worse of its two ranks is below K
    order = torch.arange(most, device=query.device, dtype=torch.int32)
    ranks = order.new_full((*whole.shape[:-1], length), most)
    ranks.scatter_(-1, whole, order.expand_as(whole))  # (B, Hkv, G, W, N)
    found = top(alone, hidden.transpose(2, 3)[:, :, None])  # (B, Hkv, P, W, G, K)
    ranks = ranks.transpose(2, 3)[:, :, None].expand(*found.shape[:-1], -1)
    worse = torch.maximum(ranks.gather(-1, found), order)
    shares = torch.stack([torch.count_nonzero(worse[..., :k] < k, dim=-1) / k for k in budgets])
    return shares.permute(0, 1, 4, 2, 5, 3).flatten(3, 4)


def dominant(agreement: Tensor, chunks: int, groups: int, shared: bool) -> Tensor:
    """Choose the chunks with the highest agreement.

    The sum of single agreements is to be as large as possible, so that the best ones are the exact solution.

    Parameters
    ----------
    agreement : Tensor
        (Hq, P).
    chunks : int
        How many.
    groups : int
        Query heads a key head.
    shared : bool
        One set for all query heads of a key head, by their mean agreement.

    Returns
    -------
    Tensor
        (Hq, chunks) int64, ascending.
    """
    if shared:
        mean = agreement.view(-1, groups, agreement.shape[-1]).mean(1)
        agreement = mean.repeat_interleave(groups, dim=0)
    order = agreement.argsort(dim=-1, descending=True, stable=True)
    return order[:, :chunks].sort(-1).values


class AgreementLayer(ReadLayer):
    """Measures agreement on decoded tokens, and attends the ordinary way."""

    def __init__(self, pairs: Tensor, budgets: Sequence[int], every: int) -> None:
        self.pairs, self.budgets, self.every = pairs, budgets, every
        self.sums: dict[int, Tensor] = {}
        self.counts = dict.fromkeys(budgets, 0)

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """Add the agreement at every budget that is at most half of what the queries see."""
        if in_prompt(layer) or layer.fill % self.every:
            return
        seen = Seen.of(mask, query.shape[2], key)
        budgets = [budget for budget in self.budgets if 2 * budget <= int(seen.total.min())]
        if not budgets:
            return
        for budget, found in zip(budgets, agreements(query, key, self.pairs, budgets, seen), strict=True):
            self.sums[budget] = self.sums.get(budget, torch.zeros(())) + found.sum((0, 1)).cpu()
            self.counts[budget] += found.shape[0] * found.shape[1]


def measure_agreement(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    pairs: Tensor,
    budgets: Sequence[int] = BUDGETS,
    seed: int | None = None,
    every: int = 1,
) -> Agreement:
    """Let the model go on from prompts with full attention, and average the agreement over its steps.

    Parameters
    ----------
    model : PreTrainedModel
        With rotary positions.
    prompts : sequence of sequence of int
        Token ids; a batch.
    new_tokens : int
        Steps.
    pairs : Tensor
        (P, 2) int64, from `pairs_of`.
    budgets : sequence of int
        Sizes of the sets compared; those above half of the text are left out.
    seed : int, optional
        Sample at temperature 1; without it, greedy.
    every : int
        Measure at one step of so many.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    states = [AgreementLayer(pairs, budgets, every) for _ in range(layers)]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with attached(model):
        target = Target(model, readers=states)
        logits = target.prefill(prompts)
        for _ in range(new_tokens):
            if generator is None:
                ids = logits.argmax(-1)
            else:
                ids = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            logits = target.score(TokenTree.roots(ids.tolist()))[:, -1]
            target.commit([[0]] * len(prompts))
    measured = [state for state in states if state.sums]  # sliding layers are asked for nothing
    kept = tuple(budget for budget in budgets if measured[0].counts[budget])
    empty = torch.zeros_like(measured[0].sums[kept[0]])
    means = [torch.stack([s.sums[k] / s.counts[k] if s.sums else empty for s in states]) for k in kept]
    return Agreement(kept, torch.stack(means).float())
