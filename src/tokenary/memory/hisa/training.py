"""Distilling an indexer: what it says of a token should follow how much the layer's heads attend to it.

    p[t, s] = mean over heads of softmax_s(q_t . k_s)        loss = KL(p[t] || softmax_s I[t, s]),  all s <= t

This is the first of DSA's two stages, which leaves the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenary.core.seeding import substream
from tokenary.hf.cache import TokenLayer
from tokenary.hf.rotation import Rotation
from tokenary.hf.target import Target, attached
from tokenary.memory.base import ReadLayer
from tokenary.memory.hisa.indexer import LightningIndexer, score

HEADS, WIDTH = 4, 32
LR, WARM = 2e-3, 16
ROWS = 128  # queries an update
UPDATES = 4  # a text, each with other queries


@dataclass(frozen=True)
class Looks:
    """Some queries of one layer, and all they may attend to.

    Parameters
    ----------
    queries, keys : Tensor
        (Hq, Q, D) and (Hkv, N, D), rotated, float32.
    places : Tensor
        Position of each query, (Q,).
    scale : float
        Factor on the logits.
    """

    queries: Tensor
    keys: Tensor
    places: Tensor
    scale: float

    def among(self, rows: slice) -> Looks:
        """Take some of the queries."""
        return Looks(self.queries[:, rows], self.keys, self.places[rows], self.scale)

    @property
    def hidden(self) -> Tensor:
        """Which tokens come after a query, (Q, N) bool."""
        return torch.arange(self.keys.shape[1], device=self.places.device) > self.places[:, None]

    def attention(self) -> Tensor:
        """Attention of each query, averaged over the heads: (Q, N), rows sum to one."""
        grouped = self.queries.unflatten(0, (len(self.keys), -1))  # (Hkv, G, Q, D)
        logits = grouped @ self.keys[:, None].transpose(-1, -2) * self.scale
        return logits.masked_fill_(self.hidden, float("-inf")).softmax(-1).mean((0, 1))


class _Watch(ReadLayer):
    """Reads everything, and notes queries and keys."""

    def __init__(self, places: Tensor) -> None:
        self.places, self.seen = places, (Tensor(), Tensor(), 0.0)

    def attend(
        self, layer: TokenLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """Note them."""
        self.seen = (query[0].index_select(1, self.places).float(), key[0].float(), scale)


def looks(model: PreTrainedModel, ids: Sequence[int], places: Tensor) -> list[Looks]:
    """Read a text in one pass; return what the queries at `places` (Q,) look at, in every layer."""
    places = places.to(model.device)
    readers = [_Watch(places) for _ in range(model.config.get_text_config(decoder=True).num_hidden_layers)]
    with attached(model):
        Target(model, None, readers).prefill([ids], chunk=len(ids))
    with torch.inference_mode(False):  # clones may take part in a gradient, tensors of an inference pass may not
        seen = [reader.seen for reader in readers]
        return [Looks(query.clone(), key.clone(), places, scale) for query, key, scale in seen]


def index_logits(indexer: LightningIndexer, look: Looks, rotation: Rotation) -> Tensor:
    """Score every token for every query: (Q, N), -inf at later ones."""
    order = torch.arange(look.keys.shape[1], device=look.places.device)
    queries, weights = indexer.queries(rotation(look.queries, -look.places), look.places)
    keys = indexer.keys(rotation(look.keys, -order), order)
    return score(queries, weights, keys).masked_fill(look.hidden, float("-inf"))


def divergence(indexer: LightningIndexer, look: Looks, rotation: Rotation) -> Tensor:
    """KL(attention || softmax of the index) in nats, mean over queries."""
    true = look.attention()
    said = index_logits(indexer, look, rotation).log_softmax(-1).masked_fill(look.hidden, 0.0)
    return (torch.special.xlogy(true, true) - true * said).sum(-1).mean()


@torch.no_grad()
def captured(indexer: LightningIndexer, look: Looks, rotation: Rotation, count: int) -> tuple[float, float]:
    """Mean share of the attention that the `count` tokens of highest score get, and the best that as many can get."""
    true = look.attention()
    top = index_logits(indexer, look, rotation).topk(count).indices
    return float(true.gather(1, top).sum(1).mean()), float(true.topk(count).values.sum(1).mean())


def fresh(sample: Sequence[Looks], seed: int, heads: int = HEADS, width: int = WIDTH) -> list[LightningIndexer]:
    """Make an indexer for every layer, its inputs brought to the size of those of `sample`."""
    indexers = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for look in sample:
            query_size, key_size = (states[:, 0].numel() for states in (look.queries, look.keys))
            indexer = LightningIndexer(query_size, key_size, heads, width)
            indexer.query_scale.fill_(look.queries.square().mean().rsqrt())
            indexer.key_scale.fill_(look.keys.square().mean().rsqrt())
            indexers.append(indexer.to(look.places.device))
    return indexers


def distil(
    model: PreTrainedModel, rotation: Rotation, texts: Sequence[Sequence[int]], seed: int = 0
) -> Iterator[tuple[list[LightningIndexer], float]]:
    """Train indexers on texts, each read once.

    Parameters
    ----------
    model : PreTrainedModel
        Frozen.
    rotation : Rotation
        Its own.
    texts : sequence of token ids
        Of one token at least.
    seed : int
        Of the first weights and of the queries that are trained on.

    Yields
    ------
    list of LightningIndexer, float
        The indexers after each text, always the same object, and the mean loss on it.
    """
    indexers: list[LightningIndexer] = []
    optimizer = None
    for number, ids in enumerate(texts):
        drawn = substream(seed, "hisa rows", number).permutation(len(ids))[: UPDATES * ROWS]
        found = looks(model, ids, torch.from_numpy(drawn))
        with torch.inference_mode(False), torch.enable_grad():
            if optimizer is None:
                indexers = fresh(found, seed)
                optimizer = torch.optim.Adam(nn.ModuleList(indexers).parameters(), lr=LR, betas=(0.9, 0.98))
            total = 0.0
            for update in range(-(-len(drawn) // ROWS)):
                for group in optimizer.param_groups:
                    group["lr"] = LR * rate(number * UPDATES + update, len(texts) * UPDATES)
                optimizer.zero_grad()
                for indexer, look in zip(indexers, found, strict=True):
                    loss = divergence(indexer, look.among(slice(update * ROWS, (update + 1) * ROWS)), rotation)
                    loss.backward()
                    nn.utils.clip_grad_norm_(indexer.parameters(), 1.0)
                    total += loss.item()
                optimizer.step()
        yield indexers, total / (len(found) * -(-len(drawn) // ROWS))


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: up over the first steps, then down to nothing along a cosine."""
    return min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * step / steps)))
