"""How much attention tokens receive, judged by the queries of a few probe tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokenary.core.seeding import substream

BLOCK = 64  # probe rows whose attention is held at once

Probes = Literal["both", "recent", "random", "all"]
Saliency = Literal["normalized", "length", "accumulated", "recent", "random"]


def probe_positions(count: int, share: float, kind: Probes, seed: int, *names: int | str) -> list[int]:
    """Choose the probes among `count` tokens, ascending, from 0.

    Parameters
    ----------
    count : int
        Tokens.
    share : float
        Share of them that are probes, rounded, at least one of each kind.
    kind : {"both", "recent", "random", "all"}
        ``both``: half of the share are the newest tokens, half are random among the others.
    seed, *names
        Of the random ones.
    """
    if kind == "all":
        return list(range(count))
    half = share / 2 if kind == "both" else share
    recent = min(count, max(1, round(half * count))) if kind != "random" else 0
    others = count - recent
    n_random = min(others, max(1, round(half * count))) if kind != "recent" else 0
    drawn = substream(seed, "zipcache", *names).permutation(others)[:n_random]
    return [*sorted(drawn.tolist()), *range(others, count)]


def received(queries: Tensor, positions: Tensor, keys: Tensor, scaling: float, first: int = 0) -> Tensor:
    """Sum the attention that tokens receive from probes and from the query heads of a group.

    Parameters
    ----------
    queries : Tensor
        (Hq, P, D), of the probes.
    positions : Tensor
        (P), which of the keys each probe is: it sees those up to itself.
    keys : Tensor
        (Hkv, N, D).
    scaling : float
        Factor on the logits.
    first : int
        Tokens before this one are attended to, but not asked for.

    Returns
    -------
    Tensor
        (Hkv, N - first) float32.
    """
    kv_heads, n_keys, size = keys.shape
    at = torch.arange(n_keys, device=keys.device)
    total = torch.zeros(kv_heads, n_keys - first, device=keys.device)
    transposed = keys.float().mT
    for rows, where in zip(queries.split(BLOCK, dim=1), positions.split(BLOCK), strict=True):
        logits = torch.matmul(rows.float().reshape(kv_heads, -1, size) * scaling, transposed)
        logits = logits.view(kv_heads, -1, len(where), n_keys).masked_fill_(at > where[:, None], float("-inf"))
        total += logits.softmax(-1)[..., first:].sum((1, 2))
    return total


def normalize(total: Tensor, positions: Tensor, first: int, kind: Saliency) -> Tensor:
    """Turn what tokens received, (Hkv, n), into a score.

    ``normalized`` divides by the number of probes that could see a token, as the paper does;
    ``length`` by the number of tokens that could, as the released code does; ``accumulated`` by nothing. A token that
    no probe can see is as salient as can be.
    """
    at = torch.arange(first, first + total.shape[1], device=total.device)
    if kind == "accumulated":
        return total
    if kind == "length":
        return total / (first + total.shape[1] - at)
    visible = len(positions) - torch.searchsorted(positions, at)  # probes at or behind each token
    return torch.where(visible > 0, total / visible.clamp(min=1), float("inf"))


@dataclass(frozen=True)
class Chooser:
    """Which tokens of a segment are salient; fields as the options of `ZipCache`."""

    share: float
    saliency: Saliency
    probes: Probes
    probed: float
    seed: int
    layer: int

    @property
    def asks(self) -> bool:
        """Whether it looks at attention."""
        return self.share not in (0, 1) and self.saliency not in ("recent", "random")

    def probes_of(self, first: int, count: int) -> list[int]:
        """Return the probes among `count` tokens from `first` on."""
        found = probe_positions(count, self.probed, self.probes, self.seed, self.layer, first)
        return [first + at for at in found]

    def choose(self, first: int, keys: Tensor, queries: Tensor | None, scaling: float) -> Tensor:
        """Choose the salient tokens of every head, as many in each.

        Parameters
        ----------
        first : int
            Where the segment begins.
        keys : Tensor
            (Hkv, N, D), all tokens up to the end of the segment; only those of the segment where nothing is asked.
        queries : Tensor or None
            (Hq, P, D) of the segment's probes; None where nothing is asked.
        scaling : float
            Factor on the logits.

        Returns
        -------
        Tensor
            (Hkv, n) bool.
        """
        heads = len(keys)
        if self.asks:
            assert queries is not None
            at = torch.tensor(self.probes_of(first, keys.shape[1] - first), device=keys.device)
            scores = normalize(received(queries, at, keys, scaling, first), at, first, self.saliency)
        elif self.saliency == "random":
            drawn = substream(self.seed, "zipcache", "salient", self.layer, first).random(
                (heads, keys.shape[1]), dtype=np.float32
            )
            scores = torch.from_numpy(drawn).to(keys.device)
        else:
            scores = torch.arange(keys.shape[1], device=keys.device).expand(heads, -1)
        salient = torch.ones(scores.shape, dtype=torch.bool, device=keys.device)
        lowest = scores.topk(int((1 - self.share) * scores.shape[1] + 1e-9), largest=False).indices
        return salient.scatter_(1, lowest, False)
