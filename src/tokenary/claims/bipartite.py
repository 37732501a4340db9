"""A rival of the claims about reducing: token merging by bipartite matching (Bolya et al. 2022, arXiv 2210.09461)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenary.core.budget import Budget
from tokenary.core.token_map import TokenMap
from tokenary.reduce.base import Context, Reducer
from tokenary.reduce.mix import segments


class BipartiteMerging(Reducer):
    """Merge the most alike pairs of every second token and the others, as token merging (ToMe) does.

    Likeness is the cosine of keys averaged over heads. A round merges at most half of the tokens; where more are to go,
    rounds follow with the means of what was merged.

    Parameters
    ----------
    keep : Budget
        How much stays.
    """

    needs = frozenset({"keys"})
    kind = "merge"
    at = "vision:25%,50%,75%"
    proportional = True

    def __init__(self, keep: Budget = Budget(ratio=0.25)) -> None:  # noqa: B008 (frozen)
        super().__init__(keep)

    def plan(self, x: Tensor, keep: int, context: Context) -> TokenMap:
        """Merge pairs, the most alike first."""
        keys = context.by_picture(context.image(context.keys[context.layer].mean(1), 1)).float()
        assign = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        sizes = context.size_of(x)
        while keys.shape[1] > keep:
            step = match(keys, min(keys.shape[1] // 2, keys.shape[1] - keep))
            merged = segments(step, int(step.max()) + 1, sizes)
            assign = merged.assign.expand(len(x), -1).gather(1, assign)
            keys, sizes = merged.apply(keys), merged.sizes(sizes)
        return segments(assign, keep, context.sizes)


def match(keys: Tensor, merges: int) -> Tensor:
    """Give tokens (B, N, d) numbers (B, N) of N - `merges` groups: the most alike pairs of even and odd tokens."""
    batch, n = keys.shape[:2]
    unit = F.normalize(keys, dim=-1)
    best = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)  # of every even token the odd one that is most like it
    order = best.values.argsort(dim=-1, descending=True, stable=True)[:, :merges]
    owner = torch.arange(n, device=keys.device).repeat(batch, 1)
    owner.scatter_(1, 2 * order, 2 * best.indices.gather(1, order) + 1)
    alone = owner == torch.arange(n, device=keys.device)
    return (alone.cumsum(-1) - 1).gather(1, owner)
