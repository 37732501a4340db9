"""Hybrid attention: a softmax over exact tokens and a linear sum over all others, under one normaliser.

::

    exact:   u_i = exp(q . k_i / sqrt(D) - max)         i in this chunk (<= t), the one before, and salient older ones
    linear:  S = sum phi_k(k_i) v_i^T,  Z = sum phi_k(k_i)           i in all other tokens
    y = (sum_i u_i v_i + g * phi_q(q) S) / (sum_i u_i + phi_q(q) . Z)

The largest u is 1, so that the divisor needs no constant to keep it from zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenary.memory.still.branches import Exact, State
from tokenary.memory.still.maps import Maps
from tokenary.memory.still.routing import Rule, leaving, staying


@dataclass(frozen=True, eq=False)
class Plan:
    """Which tokens of a text are exact, and which are summed, for the queries of every chunk.

    Parameters
    ----------
    chunk : int
        Tokens a chunk, l.
    kept : list of Tensor
        For each chunk, the exact tokens older than the chunk before it, (Hkv, E) int64.
    gone : Tensor
        What leaves when the third chunk begins, when the fourth does, and so on, (Hkv, J, l - r) int64.
    """

    chunk: int
    kept: list[Tensor]
    gone: Tensor

    @classmethod
    def of(cls, rule: Rule, scores: Tensor, tokens: int, layer: int = 0) -> Plan:
        """Choose from the chunks of a text of so many tokens; scores (Hkv, N), read as far as chunks become old."""
        kv_heads, chunk = len(scores), rule.chunk
        kept = [torch.empty(kv_heads, 0, dtype=torch.long, device=scores.device)] * 2
        gone = [kept[0].new_empty(kv_heads, 0, chunk - rule.salient)]
        for number in range(rule.old(tokens - 1)):
            fallen = torch.arange(number * chunk, (number + 1) * chunk, device=scores.device)
            pool = torch.cat([kept[-1], fallen.expand(kv_heads, -1)], dim=1)
            stay = staying(rule, kept[-1].shape[1], scores[:, fallen], layer, number)
            gone.append(pool.gather(1, leaving(stay, pool.shape[1]))[:, None])
            kept.append(pool.gather(1, stay))
        return cls(chunk, kept, torch.cat(gone, dim=1))

    def exact(self, query_states: Tensor, key_states: Tensor, value_states: Tensor, scaling: float) -> Exact:
        """Attend to exact tokens, chunk by chunk; arguments as in `hybrid_attention`."""
        n_keys = key_states.shape[1]
        first, queries = n_keys - query_states.shape[1], query_states * scaling
        queries = queries.unflatten(0, (len(key_states), -1))  # (Hkv, G, Q, D)
        parts = []
        for number in range(first // self.chunk, -(-n_keys // self.chunk)):
            start, stop = number * self.chunk, min((number + 1) * self.chunk, n_keys)
            near, kept = slice(max(0, start - self.chunk), stop), self.kept[number]
            keys, values = (torch.cat([taken(x, kept), x[:, near]], dim=1) for x in (key_states, value_states))
            logits = queries[:, :, max(start, first) - first : stop - first] @ keys[:, None].mT  # (Hkv, G, W, M)
            width = logits.shape[2]
            later = torch.ones(width, width, dtype=torch.bool, device=keys.device).triu_(1)
            logits[..., -width:].masked_fill_(later, float("-inf"))
            parts.append(Exact.of(logits, values))
        return Exact(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("sums", "mass", "most")))

    def linear(
        self, query_states: Tensor, key_states: Tensor, value_states: Tensor, maps: Maps
    ) -> tuple[Tensor, Tensor]:
        """Read the sums of what left, as each chunk finds them; see `hybrid_attention` and `State.read`."""
        n_keys, n_queries, groups = key_states.shape[1], query_states.shape[1], maps.heads // len(key_states)
        first = n_keys - n_queries
        keys, values = (
            taken(x, self.gone.flatten(1)).repeat_interleave(groups, dim=0).unflatten(1, self.gone.shape[1:])
            for x in (key_states, value_states)
        )  # (Hq, J, l - r, D)
        features = maps.key(keys.transpose(0, 1)).transpose(0, 1)
        # The first two chunks find nothing; every later one finds what left up to its beginning.
        products = pad((features.mT @ values).cumsum(1), (0, 0, 0, 0, 2, 0))[:, first // self.chunk :]
        weights = pad(features.sum(2).cumsum(1), (0, 0, 2, 0))[:, first // self.chunk :]
        before = first % self.chunk
        asked = pad(maps.query(query_states), (0, 0, before, -n_keys % self.chunk)).unflatten(1, (-1, self.chunk))
        found = State(products[:, : asked.shape[1]], weights[:, : asked.shape[1]]).read(asked)
        sums, mass = (x.flatten(1, 2)[:, before : before + n_queries] for x in found)
        return sums, mass


def hybrid_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    gates: Tensor,
    scores: Tensor,
    maps: Maps,
    rule: Rule,
    scaling: float,
    layer: int = 0,
) -> Tensor:
    """Attend to a whole text chunk by chunk: the form for prompts and for training.

    Parameters
    ----------
    query_states, key_states, value_states : Tensor
        (Hq, Q, D), the newest of the N tokens of keys and values (Hkv, N, D); rotated.
    gates : Tensor
        (Hq, Q, D).
    scores : Tensor
        Saliency of the tokens, (Hkv, N).
    maps : Maps
        Of the layer; gradients reach them.
    rule : Rule
        What stays exact.
    scaling : float
        Factor on the logits.
    layer : int
        Names random numbers.

    Returns
    -------
    Tensor
        (Hq, Q, D). Each row is what decoding token by token gives.
    """
    plan = Plan.of(rule, scores, key_states.shape[1], layer)
    exact = plan.exact(query_states, key_states, value_states, scaling)
    return exact.joined(plan.linear(query_states, key_states, value_states, maps), gates, rule.rescale)


def taken(states: Tensor, places: Tensor) -> Tensor:
    """Take tokens (Hkv, M) of keys or values (Hkv, N, D): (Hkv, M, D)."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
