"""Which tokens stay exact: self-saliency, computed in windows, and the choice of every chunk.

With s[t, i] the attention logits of token t over its window, the last l tokens and itself among them::

    a = softmax(s[t, :])      b = softmax of the same without i = t      score[t] = sum_i a_i log((a_i + e) / (b_i + e))

A token that says much to itself changes its own attention much when it is left out. A chunk is chosen from once, when
it is two chunks old: its r tokens of highest score stay, for each key head the scores averaged over its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenary.core.seeding import substream

Routing = Literal["saliency", "recent", "random"]
EPS = 1e-8


@dataclass(frozen=True)
class Rule:
    """What stays exact, and how the branches are joined.

    Parameters
    ----------
    chunk, salient : int
        Tokens a chunk, l, and how many of them stay exact, r.
    routing : {"saliency", "recent", "random"}
        The r most salient of every chunk; as controls, a window that is r tokens longer for every chunk, or any r.
    rescale : bool
        Bring the linear branch to the scale of the exact one, whose logits are taken off their maximum.
    seed : int
        Of random tokens.
    """

    chunk: int = 64
    salient: int = 4
    routing: Routing = "saliency"
    rescale: bool = False
    seed: int = 0

    @property
    def scores(self) -> bool:
        """Whether saliency decides anything."""
        return self.routing == "saliency" and 0 < self.salient < self.chunk

    @property
    def everything(self) -> bool:
        """Whether every token stays exact."""
        return self.salient == self.chunk

    def old(self, tokens: int) -> int:
        """Return how many chunks are two chunks old for the token behind the first `tokens`."""
        return max(0, tokens // self.chunk - 1)


def staying(rule: Rule, older: int, scores: Tensor, layer: int, number: int) -> Tensor:
    """Choose what stays of the exact older tokens and of the chunk that becomes old.

    Parameters
    ----------
    rule : Rule
        How to choose.
    older : int
        Exact tokens older than the chunk.
    scores : Tensor
        Of the tokens of the chunk, (Hkv, l).
    layer, number : int
        Of the layer, and of the chunk in its text: they name random numbers.

    Returns
    -------
    Tensor
        Places in the older ones followed by the chunk, ascending, (Hkv, older + r) int64.
    """
    kv_heads, device = len(scores), scores.device
    if rule.routing == "recent":
        return torch.arange(rule.chunk - rule.salient, older + rule.chunk, device=device).expand(kv_heads, -1)
    if rule.routing == "random":
        drawn = substream(rule.seed, "still", layer, number).random(tuple(scores.shape))
        scores = torch.from_numpy(drawn).to(device)
    chosen = scores.topk(rule.salient).indices.sort(-1).values + older
    return torch.cat([torch.arange(older, device=device).expand(kv_heads, -1), chosen], dim=-1)


def leaving(stay: Tensor, total: int) -> Tensor:
    """List the places of `total` that are not in `stay` (Hkv, M): (Hkv, total - M) int64, ascending."""
    gone = torch.ones(len(stay), total, dtype=torch.bool, device=stay.device).scatter_(1, stay, False)
    return gone.nonzero()[:, 1].view(len(stay), total - stay.shape[1])


def self_saliency(logits: Tensor, own: Tensor) -> Tensor:
    """Score tokens by how much their attention changes when they may not attend to themselves.

    Parameters
    ----------
    logits : Tensor
        Of each token over its window, (..., W), -inf where it must not look.
    own : Tensor
        Which entry is the token itself, broadcastable to (..., W) bool, one a row.

    Returns
    -------
    Tensor
        KL divergence in nats, (...); for the first token of a text, which has no other to look at, about -log e.
    """
    attention = logits.softmax(-1)
    without = logits.masked_fill(own, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (attention * ((attention + EPS) / (without + EPS)).log()).sum(-1)


def prompt_saliency(query_states: Tensor, key_states: Tensor, scaling: float, chunk: int) -> Tensor:
    """Score the newest tokens of a text, each over the last `chunk` tokens: work grows with Q * chunk.

    Parameters
    ----------
    query_states, key_states : Tensor
        (Hq, Q, D), the newest of the keys (Hkv, N, D).
    scaling : float
        Factor on the logits.
    chunk : int
        Tokens of the window, the token itself among them.

    Returns
    -------
    Tensor
        (Hkv, Q), averaged over the query heads of each key head.
    """
    (kv_heads, n_keys, size), n_queries = key_states.shape, query_states.shape[1]
    first, blocks = n_keys - n_queries, -(-n_queries // chunk)
    queries = pad(query_states * scaling, (0, 0, 0, blocks * chunk - n_queries))
    queries = queries.view(kv_heads, -1, blocks, chunk, size)  # (Hkv, G, C, l, D)
    # Every block of l queries looks at its own l keys and at the l before them; what lies outside the text is padding.
    padded = pad(key_states[:, max(0, first - chunk) :], (0, 0, max(0, chunk - first), blocks * chunk - n_queries))
    keys = padded.unfold(1, 2 * chunk, chunk)  # (Hkv, C, D, 2 l)
    logits = queries @ keys[:, None]  # (Hkv, G, C, l, 2 l)
    at = torch.arange(chunk, device=keys.device)[:, None]
    place = torch.arange(2 * chunk, device=keys.device) - chunk  # of a key, counted from the first query of its block
    start = first + torch.arange(blocks, device=keys.device)[:, None, None] * chunk
    seen = (place <= at) & (place > at - chunk) & (place + start >= 0)
    scores = self_saliency(logits.masked_fill(~seen, float("-inf")), place == at)
    return scores.flatten(-2)[..., :n_queries].mean(1)
